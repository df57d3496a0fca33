"""Live memory during a training step as a formula: from two traces of a shallow model to any depth, batch and length.

Decoder layers repeat, and so does what they allocate. A trace is cut at each layer's forward and backward pass; a layer
in the middle is the template of all that a deeper model has more. The size of a tensor is a product of dimensions, so
it grows with one of a few quantities: it is constant, or so many bytes per position, per token, per pair of positions.
One trace tells which, if its batch and length are primes that no other dimension has. Live memory after each change is
then a line in the quantities, and the peak is the largest of these lines. Over equal layers in a row a line is extreme
at the first or the last of them, so that depth costs nothing.

This holds as far as layers do repeat and sizes are such products, which is checked and not assumed: the lines must go
through a second trace, of another batch, length and depth, and those of the layer in the middle through two layers.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autotune.spec.cluster import Device
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

MAX_WHOLE_LAYERS = 6
"""A model no deeper is traced as it is."""


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


QUANTITIES = 4
"""Constant bytes, bytes per position, per token, and per sequence and pair of positions (attention scores)."""
TRACED_LENGTH, CHECKED_LENGTH = 251, 509
TRACED_BATCH, CHECKED_BATCH = 13, 17
"""Primes that are no factor of usual widths, numbers of heads or vocabularies."""
REPLAYED_BATCH = 2
REPLAYED_TOKENS = (1024, 4096, 16384)
"""Micro-batches for which fragmentation is known (`reserved.py`)."""


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


def _none() -> NDArray[np.float64]:
    return np.zeros(len(REPLAYED_TOKENS))


@dataclass(frozen=True, slots=True)
class Stream:
    """Live memory during a step, at the changes after which it may be highest."""

    live: NDArray[np.float64]
    """(changes, parts, QUANTITIES): bytes of each part."""
    fragmentation: NDArray[np.float64] = field(default_factory=_none)
    """(points,): bytes reserved beyond the peak, with each of `REPLAYED_TOKENS`."""
    pieces: int = 1
    """Into how many a sequence is cut by ranks and by the loss. Lengths are of one piece: a tensor of a piece would be
    no multiple of a whole length."""

    @classmethod
    def of(cls, trace: Trace) -> "Stream":
        """The stream of a model of just the traced depth."""
        return cls(_candidates(np.concatenate(list(_live(trace).values()))))

    def peak_bytes(
        self, micro_batch_size: NDArray[np.int64], sequence_length: NDArray[np.int64], device: Device
    ) -> NDArray[np.float64]:
        """Highest live bytes of the device (points,)."""
        values = quantities(micro_batch_size, sequence_length / self.pieces)
        peaks: NDArray[np.float64] = (values @ (self.live * _counted(device)).sum(axis=1).T).max(axis=1)
        return peaks

    def breakdown(self, micro_batch_size: int, sequence_length: int, device: Device) -> dict[Part, int]:
        """Bytes of each part at the device's peak, of the host besides; parts without any are left out."""
        values = quantities(np.array([micro_batch_size]), np.array([sequence_length / self.pieces]))[0]
        parts = self.live @ values
        return _named(parts[(parts @ _counted(device)[:, 0]).argmax()])


@dataclass(frozen=True, slots=True)
class SitedStream:
    """Live memory where layers do not repeat, as with buckets that fill at any place: a line in depth for each site.

    A site is an operator in a kind of segment of a micro-step. The highest live bytes at each are taken at two depths
    and carried on as a straight line; the peak is the highest of them. Unlike a `Stream`, this is an approximation.
    """

    shallow: NDArray[np.float64]
    """(rows, parts, QUANTITIES): what may be highest at each site, site by site."""
    deep: NDArray[np.float64]
    shallow_starts: NDArray[np.int64]
    """(sites,): the first row of each site in `shallow`."""
    deep_starts: NDArray[np.int64]
    steps: float
    """The model's depth beyond the shallow trace, in units of the difference between the two traces."""
    fragmentation: NDArray[np.float64] = field(default_factory=_none)
    """(points,): as a `Stream`'s, but that of the deeper trace."""
    pieces: int = 1
    """As a `Stream`'s."""

    @classmethod
    def between(cls, shallow: Trace, deep: Trace, layers: int, update_share: float = 1.0) -> "SitedStream":
        """Carry two traces of one structure on to `layers` decoder layers; see `Structure.stream`."""
        low, high = _sites(shallow, update_share), _sites(deep, update_share)
        common = [site for site in low if site in high]
        return cls(
            shallow=np.concatenate([low[site] for site in common]),
            deep=np.concatenate([high[site] for site in common]),
            shallow_starts=np.cumsum([0, *(len(low[site]) for site in common[:-1])]),
            deep_starts=np.cumsum([0, *(len(high[site]) for site in common[:-1])]),
            steps=(layers - shallow.layers) / (deep.layers - shallow.layers),
        )

    def peak_bytes(
        self, micro_batch_size: NDArray[np.int64], sequence_length: NDArray[np.int64], device: Device
    ) -> NDArray[np.float64]:
        """Highest live bytes of the device (points,)."""
        values, counted = quantities(micro_batch_size, sequence_length / self.pieces), _counted(device)
        low = np.maximum.reduceat(values @ (self.shallow * counted).sum(axis=1).T, self.shallow_starts, axis=1)
        high = np.maximum.reduceat(values @ (self.deep * counted).sum(axis=1).T, self.deep_starts, axis=1)
        peaks: NDArray[np.float64] = (low + self.steps * (high - low)).max(axis=1)
        return peaks

    def breakdown(self, micro_batch_size: int, sequence_length: int, device: Device) -> dict[Part, int]:
        """Bytes of each part at the device's peak, of the host besides; parts without any are left out."""
        values = quantities(np.array([micro_batch_size]), np.array([sequence_length / self.pieces]))[0]
        counted = _counted(device)[:, 0]
        low, high = self.shallow @ values, self.deep @ values
        lows = np.maximum.reduceat(low @ counted, self.shallow_starts)
        highs = np.maximum.reduceat(high @ counted, self.deep_starts)
        site = int((lows + self.steps * (highs - lows)).argmax())
        at_low = _highest_row(low, self.shallow_starts, site, counted)
        return _named(at_low + self.steps * (_highest_row(high, self.deep_starts, site, counted) - at_low))


@dataclass(frozen=True, slots=True)
class PipelineStream:
    """Live memory of a rank with more micro-batches than are traced: a line through two numbers of them.

    No more activations live the more there are, but buffers for what each receives, and what is sent, until the step
    ends.
    """

    fewer: Stream | SitedStream
    more: Stream | SitedStream
    steps: float
    """The number of micro-batches beyond the fewer, in units of the difference between the two."""

    @property
    def pieces(self) -> int:
        """As a `Stream`'s."""
        return self.more.pieces

    @property
    def fragmentation(self) -> NDArray[np.float64]:
        """(points,): as a `Stream`'s, but that of more."""
        return self.more.fragmentation

    def peak_bytes(
        self, micro_batch_size: NDArray[np.int64], sequence_length: NDArray[np.int64], device: Device
    ) -> NDArray[np.float64]:
        """Highest live bytes of the device (points,)."""
        fewer = self.fewer.peak_bytes(micro_batch_size, sequence_length, device)
        more = self.more.peak_bytes(micro_batch_size, sequence_length, device)
        return fewer + self.steps * (more - fewer)

    def breakdown(self, micro_batch_size: int, sequence_length: int, device: Device) -> dict[Part, int]:
        """Bytes of each part at the device's peak, of the host besides; parts without any are left out."""
        fewer = self.fewer.breakdown(micro_batch_size, sequence_length, device)
        more = self.more.breakdown(micro_batch_size, sequence_length, device)
        sizes = [fewer.get(part, 0) + self.steps * (more.get(part, 0) - fewer.get(part, 0)) for part in PARTS]
        return _named(np.array(sizes))


RankStream = Stream | SitedStream | PipelineStream


def fragmentation_bytes(
    stream: RankStream,
    micro_batch_size: NDArray[np.int64],
    sequence_length: NDArray[np.int64],
    device: Device,
) -> NDArray[np.float64]:
    """What the caching allocator reserves beyond the peak (points,); nothing on a CPU.

    A line between the points of the stream. Beyond the last one it grows like what depends on tokens.
    """
    tokens = micro_batch_size * sequence_length / stream.pieces
    if device == "cpu":
        return np.zeros_like(tokens)
    beyond = np.maximum(tokens / REPLAYED_TOKENS[-1], 1.0)
    size: NDArray[np.float64] = beyond * np.interp(tokens, REPLAYED_TOKENS, stream.fragmentation)
    return size


def _counted(device: Device) -> NDArray[np.float64]:
    """(parts, 1): 1 for what is in the device's memory."""
    return np.array([[float(part is not Part.HOST or device == "cpu")] for part in PARTS])


def _named(parts: NDArray[np.float64]) -> dict[Part, int]:
    return {part: round(float(size)) for part, size in zip(PARTS, parts, strict=True) if round(float(size))}


def _sites(trace: Trace, update_share: float) -> dict[tuple[int, Kind, str], NDArray[np.float64]]:
    rows: dict[tuple[int, Kind, str], list[NDArray[np.float64]]] = {}
    for (micro_step, kind, layer), live in _live(trace, update_share).items():
        for change, row in zip(trace.segments[micro_step, kind, layer], live, strict=True):
            rows.setdefault((micro_step, kind, change.operator), []).append(row)
    return {site: _candidates(np.stack(found)) for site, found in rows.items()}


def _highest_row(
    parts: NDArray[np.float64], starts: NDArray[np.int64], site: int, counted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The row with the highest sum of one site."""
    rows = parts[starts[site] : (*starts, len(parts))[site + 1]]
    highest: NDArray[np.float64] = rows[(rows @ counted).argmax()]
    return highest


def _live(trace: Trace, update_share: float = 1.0) -> dict[Key, NDArray[np.float64]]:
    """(changes, parts, QUANTITIES) of each segment: bytes of each part after each change."""
    live = np.zeros((len(PARTS), QUANTITIES))
    live[:, 0] = _by_part(trace.standing)
    at = PARTS.index(Part.ACTIVATIONS)
    for block in trace.standing_blocks:
        if block.part is Part.ACTIVATIONS:
            live[at, 0] -= block.bytes
            live[at] += line(block.bytes, trace)
    found: dict[Key, NDArray[np.float64]] = {}
    for key, changes in trace.segments.items():
        steps = live + _in_portions(key, _per_part(_template(changes, trace), 0), update_share)
        found[key] = steps
        live = steps[-1] if len(steps) else live
    return found


def _in_portions(key: Key, changed: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """What a segment adds to live memory, if an update works in portions: of what it adds at a time, so much less.

    What it has given up at that time stays given up.
    """
    if key[1] != "update" or share == 1:
        return changed
    added = changed.sum(axis=1)[:, 0] > 0
    return np.where(added[:, None, None], share * changed, changed)


@dataclass(frozen=True, slots=True)
class Structure:
    """What the traces of one structure say, for any depth of at least `TRACED_LAYERS`."""

    standing: NDArray[np.float64]
    """(parts,): bytes before the first micro-step."""
    standing_growth: NDArray[np.float64]
    """(parts,): further ones for each layer more."""
    templates: dict[Key, Template]
    """In order of time."""

    @classmethod
    def fit(cls, trace: Trace, deeper: Trace) -> "Structure":
        """Find the lines.

        Args:
            trace: `TRACED_LAYERS` deep, with `TRACED_LENGTH`, and one sequence or `TRACED_BATCH`.
            deeper: one layer deeper, with `CHECKED_LENGTH`, and one sequence or `CHECKED_BATCH`: it shows what grows
                with depth outside the layers, and checks the lines within them.

        Raises:
            StructureError: the traces do not fit together.
        """
        at_check = quantities(np.array([deeper.micro_batch_size]), np.array([deeper.sequence_length]))[0]
        templates: dict[Key, Template] = {}
        for key, changes in trace.segments.items():
            templates[key] = _with_growth(key, _template(changes, trace), changes, deeper, at_check)
        standing = _by_part(trace.standing)
        return cls(standing, _by_part(deeper.standing) - standing, templates)

    def stream(self, layers: int, update_share: float = 1.0) -> Stream:
        """The stream of a model with so many decoder layers.

        Args:
            layers: how many.
            update_share: the share (0..1) of this rank's parameters that the update works on at a time, where the
                traces have done all at once.

        Raises:
            StructureError: fewer layers than were traced.
        """
        if layers < TRACED_LAYERS:
            raise StructureError(f"found {layers} layers, but a structure needs {TRACED_LAYERS}")
        more = layers - TRACED_LAYERS
        live = np.zeros((len(PARTS), QUANTITIES))
        live[:, 0] = self.standing + more * self.standing_growth
        rows = [live[None]]
        for key, template in self.templates.items():
            for repeat in self._repeats(key, more):
                if repeat > 1:  # the layers between the first and the last of equal ones: only what they leave behind
                    live = live + (repeat - 1) * _per_part(template, 0)[-1]
                steps = live + _in_portions(key, _per_part(template, more), update_share)
                rows.append(steps)
                live = steps[-1] if len(steps) else live
        return Stream(_candidates(np.concatenate(rows)))

    def _repeats(self, key: Key, more: int) -> Iterator[int]:
        """How often the segment's template is applied, as one or two runs."""
        yield 1
        if key[1] in ("forward", "backward") and key[2] == MIDDLE and more:
            yield more


def _template(changes: Sequence[Change], trace: Trace) -> Template:
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


def _with_growth(
    key: Key, template: Template, changes: Sequence[Change], deeper: Trace, at_check: NDArray[np.float64]
) -> Template:
    """Add what a deeper model has more in the segment. Within layers nothing may differ."""
    micro_step, kind, layer = key
    expected = template.lines @ at_check
    if kind not in ("forward", "backward"):
        return _aligned(key, template, expected, changes, deeper.segments[key])
    # The deeper model's last layer is the shallow one's last.
    if not _is_like(deeper.segments[micro_step, kind, layer + (layer > MIDDLE)], expected):
        raise StructureError(f"a change in {_name(key)} is no line in batch and length")
    if layer == MIDDLE and not _is_like(deeper.segments[micro_step, kind, layer + 1], expected):
        raise StructureError(f"{_name((micro_step, kind, layer + 1))} is not like that of the layer before")
    return template


def _is_like(changes: Sequence[Change], expected: NDArray[np.float64]) -> bool:
    return len(changes) == len(expected) and np.allclose([c.bytes for c in changes], expected, rtol=1e-6, atol=64)


def _aligned(
    key: Key, template: Template, expected: NDArray[np.float64], changes: Sequence[Change], deeper: Sequence[Change]
) -> Template:
    """The template of a segment with what a layer more adds to it: larger changes, or further ones.

    What happens once a parameter, such as the creation of optimizer states, makes further changes. Those of all further
    layers are one change here, where those of the first further layer are; what they depend on is depth alone.
    """
    matcher = difflib.SequenceMatcher(None, [_role(c) for c in changes], [_role(c) for c in deeper], autojunk=False)
    lines: list[NDArray[np.float64]] = []
    growth: list[NDArray[np.float64]] = []
    sizes = np.array([change.bytes for change in deeper], np.float64)
    for tag, begin, end, deeper_begin, deeper_end in matcher.get_opcodes():
        if tag not in ("equal", "insert"):
            raise StructureError(f"{_name(key)}: {changes[begin].operator} is missing in a deeper model")
        more = sizes[deeper_begin:deeper_end]
        lines.append(template.lines[begin:end] if tag == "equal" else np.zeros((len(more), QUANTITIES)))
        growth.append(more - expected[begin:end] if tag == "equal" else more)
    # Labels are padded by one position: a few bytes a sequence that are no product, and no growth either.
    few = np.array([change.part in (Part.ACTIVATIONS, Part.LOGITS) for change in deeper])
    parts = np.array([PARTS.index(change.part) for change in deeper], np.int64)
    if not lines:
        return template
    return Template(np.concatenate(lines), np.where(few, 0.0, np.concatenate(growth)), parts)


def _role(change: Change) -> tuple[str, Part]:
    return change.operator, change.part


def _per_part(template: Template, more: int) -> NDArray[np.float64]:
    """(changes, parts, QUANTITIES): bytes of each part since the segment's beginning, after each change."""
    count = len(template.lines)
    each = np.zeros((count, len(PARTS), QUANTITIES))
    each[np.arange(count), template.parts] = template.lines
    each[np.arange(count), template.parts, 0] += more * template.growth
    return each.cumsum(axis=0)


def _candidates(live: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows of which no other is at least as large in every quantity, with and without what is on the host."""
    total = np.concatenate([(live * _counted(device)).sum(axis=1) for device in ("cpu", "cuda")], axis=1)
    order = np.argsort(-total.sum(axis=1), kind="stable")
    kept: list[int] = []
    for row in order:
        if not kept or not (total[kept] >= total[row]).all(axis=1).any():
            kept.append(int(row))
    return live[sorted(kept)]


def _by_part(sizes: dict[Part, int]) -> NDArray[np.float64]:
    return np.array([sizes.get(part, 0) for part in PARTS], np.float64)


def _name(key: Key) -> str:
    micro_step, kind, layer = key
    return f"micro-step {micro_step}, {kind}" + (f" of layer {layer}" if kind in ("forward", "backward") else "")
