"""What a trace holds: the changes of live memory, segment by segment, and as lines in batch and length.

The size of a tensor is a product of dimensions, so it grows with one of a few quantities: it is constant, or so many
bytes per position, per token, per pair of positions. One trace tells which, if its batch and length are primes that no
other dimension has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autotune.spec.prediction import Part

Kind = Literal["before", "forward", "between", "backward", "after", "update"]
"""Of a segment: before the first layer; a layer's forward pass; head, loss and their backward pass; a layer's backward
pass; the rest of the backward pass; the optimizer update where there is one."""

Key = tuple[int, Kind, int]
"""(micro-step, kind, layer) of a segment; layer 0 where the kind has none."""

PARTS: tuple[Part, ...] = tuple(Part)
TRACED_LAYERS = 3
"""The first, the last, and one between, of which the second trace must have two."""

MIDDLE = 1

QUANTITIES = 4
"""Constant bytes, bytes per position, per token, and per sequence and pair of positions (attention scores)."""
TRACED_LENGTH, CHECKED_LENGTH = 251, 509
TRACED_BATCH, CHECKED_BATCH = 13, 17
"""Primes that are no factor of usual widths, numbers of heads or vocabularies."""


class StructureError(ValueError):
    """The traces of a structure do not fit together; the message says where."""


class Change(NamedTuple):
    """One change of live memory."""

    operator: str
    bytes: int
    """Positive: allocated. Negative: freed."""
    part: Part
    block: int = 0
    """A number for what is allocated and later freed. Only a replay through the allocator asks for it."""


class Standing(NamedTuple):
    """A block that lives before the first micro-step."""

    block: int
    bytes: int
    part: Part


@dataclass(frozen=True, slots=True)
class Trace:
    """The changes of a few micro-steps, recorded on one rank."""

    layers: int
    micro_batch_size: int
    sequence_length: int
    """Of a piece, see `Stream.pieces`."""
    standing: dict[Part, int]
    """Bytes that live before the first micro-step: parameters, and what the engine allocates when it is built."""
    segments: dict[Key, tuple[Change, ...]]
    """In order of time. Each micro-step has `before`, every `forward`, `between`, every `backward`, `after`, and the
    last one `update`."""
    standing_blocks: tuple[Standing, ...] = ()
    """What `standing` consists of, in the order of allocation."""


def quantities(micro_batch_size: NDArray[Any], sequence_length: NDArray[Any]) -> NDArray[np.float64]:
    """The quantities (points, QUANTITIES) at points given as two arrays of equal length."""
    batch, length = micro_batch_size.astype(np.float64), sequence_length.astype(np.float64)
    return np.stack([np.ones_like(length), length, batch * length, batch * length**2], axis=1)


@dataclass(frozen=True, slots=True)
class Template:
    """The changes of one segment."""

    lines: NDArray[np.float64]
    """(changes, QUANTITIES): bytes for one of each."""
    growth: NDArray[np.float64]
    """(changes,): further constant bytes for each layer more than `TRACED_LAYERS`."""
    parts: NDArray[np.int64]
    """(changes,): index into `PARTS`."""


def live_bytes(trace: Trace, update_share: float = 1.0) -> dict[Key, NDArray[np.float64]]:
    """(changes, parts, QUANTITIES) of each segment: bytes of each part after each change."""
    live = np.zeros((len(PARTS), QUANTITIES))
    live[:, 0] = by_part(trace.standing)
    at = PARTS.index(Part.ACTIVATIONS)
    for block in trace.standing_blocks:
        if block.part is Part.ACTIVATIONS:
            live[at, 0] -= block.bytes
            live[at] += line(block.bytes, trace)
    found: dict[Key, NDArray[np.float64]] = {}
    for key, changes in trace.segments.items():
        steps = live + in_portions(key, per_part(template_of(changes, trace), 0), update_share)
        found[key] = steps
        live = steps[-1] if len(steps) else live
    return found


def in_portions(key: Key, changed: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """What a segment adds to live memory, if an update works in portions: of what it adds at a time, so much less.

    What it has given up at that time stays given up.
    """
    if key[1] != "update" or share == 1:
        return changed
    added = changed.sum(axis=1)[:, 0] > 0
    return np.where(added[:, None, None], share * changed, changed)


def template_of(changes: Sequence[Change], trace: Trace) -> Template:
    """The lines of one segment, without growth."""
    lines = np.array([line(change.bytes, trace) for change in changes]).reshape(len(changes), QUANTITIES)
    parts = np.array([PARTS.index(change.part) for change in changes], np.int64)
    return Template(lines, np.zeros(len(changes)), parts)


def line(size: int, trace: Trace) -> list[float]:
    """Bytes for one of each quantity; a size is made of one of them."""
    batch, length = trace.micro_batch_size, trace.sequence_length
    sizes = [0.0] * QUANTITIES
    for quantity, value in ((3, batch * length**2), (2, batch * length), (1, length), (0, 1)):
        # With one sequence, positions and tokens are the same number; what is counted is then tokens.
        if size % value == 0 and size:
            sizes[quantity] = size / value
            break
    return sizes


def per_part(template: Template, more: int) -> NDArray[np.float64]:
    """(changes, parts, QUANTITIES): bytes of each part since the segment's beginning, after each change."""
    count = len(template.lines)
    each = np.zeros((count, len(PARTS), QUANTITIES))
    each[np.arange(count), template.parts] = template.lines
    each[np.arange(count), template.parts, 0] += more * template.growth
    return each.cumsum(axis=0)


def by_part(sizes: dict[Part, int]) -> NDArray[np.float64]:
    """(parts,): bytes of each part, in the order of `PARTS`."""
    return np.array([sizes.get(part, 0) for part in PARTS], np.float64)
