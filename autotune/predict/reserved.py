"""What PyTorch's caching allocator reserves for a traced step and never uses: its allocations, through `allocator.py`.

A replay needs every allocation in its order, and takes a tenth of a second for a deep model. So it is done once a
structure, when that is traced, and at a few sizes; what is kept is by how much the highest reserved bytes were more
than the highest live ones. That is noisy, by how sizes happen to fit into each other: it may double from one length to
the next, which is 5 % of what is used. From 4 to 64 layers of Qwen3-32B under FSDP2 it changes no more than that, while
what lives grows up to sevenfold; so bytes are carried on, and no ratio.

The allocations of a deep model are those of the traced one with a layer in the middle repeated: each copy has blocks of
its own, and where the traced layer frees a block of its neighbour's, a copy frees that of the copy beside it.

Not seen: the building of the model and the first step, which may leave more reserved than the steps after them need;
further steps, which reserve up to 1.5 % more; streams beside the main one, on which FSDP2 and DeepSpeed gather and
reduce, and which have pools of their own; and the temporaries of a GPU's kernels.
"""

import difflib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.predict.allocator import AllocatorSettings, replay
from autotune.predict.segments import MIDDLE, QUANTITIES, Change, StructureError, Trace, line, quantities
from autotune.predict.stream import REPLAYED_BATCH, REPLAYED_TOKENS
from autotune.spec.prediction import Part

Event = tuple[int, list[float]]
"""(block, bytes for one of each quantity): positive where it is allocated, negative where it is freed."""

_SETTINGS = AllocatorSettings()
"""Trials set none, so they are PyTorch's."""
_FEW = (Part.ACTIVATIONS, Part.LOGITS)
_REPEATED = MIDDLE + 1
_NOBODYS = -1


def fragmentation(events: Sequence[Event]) -> NDArray[np.float64]:
    """Highest reserved bytes less the highest live ones, with each of `REPLAYED_TOKENS` (points,).

    Args:
        events: of one step, the first of which allocate what stands.

    Raises:
        ValueError: an event allocates a block that is not free, or frees one that is.
    """
    blocks = np.array([block for block, _ in events], np.int64)
    lines = np.array([line for _, line in events]).reshape(-1, QUANTITIES)
    tokens = np.array(REPLAYED_TOKENS)
    sizes = np.rint(lines @ quantities(np.full_like(tokens, REPLAYED_BATCH), tokens // REPLAYED_BATCH).T)
    live = sizes.cumsum(axis=0).max(axis=0, initial=0)
    steps = (replay(blocks, column, settings=_SETTINGS) for column in sizes.astype(np.int64).T)
    beyond: NDArray[np.float64] = np.array([step.reserved_peak_bytes for step in steps]) - live
    return beyond


def step_of(trace: Trace, update_share: float = 1.0) -> list[Event]:
    """The events of the step of a model of just the traced depth, on the device.

    Args:
        trace: of the step.
        update_share: as in `Structure.stream`.
    """
    step = [(block, line(size, trace)) for block, size, part in trace.standing_blocks if part is not Part.HOST]
    stands = {block for block, _ in step}
    portions: set[int] = set()
    for (_, kind, _), changes in trace.segments.items():
        for change in _on_device(changes):
            if kind == "update" and change.bytes > 0 and change.block not in stands:
                portions.add(change.block)
            share = update_share if change.block in portions else 1.0
            step.append((change.block, [share * size for size in line(change.bytes, trace)]))
    return step


def deep_step_of(shallow: Trace, trace: Trace, layers: int) -> list[Event]:
    """The events of the step of a model with `layers` decoder layers, on the device.

    Args:
        shallow: `TRACED_LAYERS` deep.
        trace: one layer deeper; together they made a `Structure`.
        layers: at least as many as in `trace`.

    Raises:
        StructureError: it cannot be told which blocks belong to which layer.
    """
    return list(_Repetition(shallow, trace, layers).events())


class _Repetition:
    """A trace of four layers, in which the third is repeated.

    A block belongs to the layer in whose pass it is born first; one that is born elsewhere, to the layer that is alone
    in touching it, or to the third one if the shallower trace has not got it. Blocks of the third layer's copies are
    numbered `block + copy * stride`.
    """

    def __init__(self, shallow: Trace, trace: Trace, layers: int) -> None:
        self._trace = trace
        self._copies = layers - trace.layers + 1
        self._standing = [standing for standing in trace.standing_blocks if standing.part is not Part.HOST]
        self._segments = {key: _on_device(changes) for key, changes in trace.segments.items()}
        changed = (change.block for changes in self._segments.values() for change in changes)
        self._stride = 1 + max(*changed, *(standing.block for standing in self._standing))
        self._lines: dict[int, list[float]] = {}  # by bytes
        self._growth: dict[int, int] = {}  # block -> bytes more for each copy but the first
        self._owner: dict[int, int] = {}  # block -> layer
        self._twin: dict[int, int] = {}  # block of the layer before the repeated one -> that of the repeated one
        self._live: set[int] = set()
        self._find_owners()
        self._find_more_that_stands(shallow)
        self._find_more_outside_of_layers(shallow)

    def events(self) -> Iterator[Event]:
        """In order of time.

        Raises:
            StructureError: a copy does not find a block that it should free.
        """
        yield from self._of_whole([Change("", size, part, block) for block, size, part in self._standing])
        for (micro_step, kind, layer), changes in self._segments.items():
            if kind not in ("forward", "backward"):
                yield from self._of_whole(changes)
            elif layer == _REPEATED:
                before = self._segments[micro_step, kind, MIDDLE]
                for copy in range(self._copies) if kind == "forward" else reversed(range(self._copies)):
                    yield from self._of_copy(copy, changes, before)
            else:
                # The last layer is beside the last copy, the others are before the first.
                beside = self._copies - 1 if layer > _REPEATED else 0
                for change in changes:
                    yield self._event(change, beside * self._owned(change.block))

    def _of_copy(self, copy: int, changes: Sequence[Change], before: Sequence[Change]) -> Iterator[Event]:
        for change, twin in zip(changes, before, strict=True):
            if self._owner.get(change.block) == MIDDLE and copy > 0:  # of the copy before
                yield self._event(change._replace(block=self._twin.get(change.block, _NOBODYS)), copy - 1)
            elif change.block != twin.block and self._owned(twin.block) and copy < self._copies - 1:  # of the one after
                yield self._event(twin, copy + 1)
            else:
                yield self._event(change, copy * self._owned(change.block))

    def _of_whole(self, changes: Sequence[Change]) -> Iterator[Event]:
        """What happens in a row to blocks of the repeated layer happens to those of one copy after another."""
        for owned, run in itertools.groupby(changes, lambda change: self._owned(change.block)):
            together = list(run)
            for copy in range(self._copies if owned else 1):
                for change in together:
                    # The last layer may leave to others what layers do for each other.
                    if not owned or change.bytes > 0 or change.block + copy * self._stride in self._live:
                        yield self._event(change, copy)

    def _owned(self, block: int) -> bool:
        """Whether it is the repeated layer's."""
        return self._owner.get(block) == _REPEATED

    def _event(self, change: Change, copy: int) -> Event:
        block = change.block + copy * self._stride
        if (change.bytes > 0) == (block in self._live):
            raise StructureError(f"a repeated layer does not find its block for {change.operator}")
        self._live ^= {block}
        size = change.bytes
        found = self._lines.get(size)
        if found is None:
            found = self._lines[size] = line(size, self._trace)
        growth = self._growth.get(change.block)
        if growth:
            more = (self._copies - 1) * growth
            found = [found[0] + (more if size > 0 else -more), *found[1:]]
        return block, found

    def _find_owners(self) -> None:
        born = {standing.block for standing in self._standing}
        touching: dict[int, set[int]] = defaultdict(set)
        for (_, kind, layer), changes in self._segments.items():
            within = kind in ("forward", "backward")
            for change in changes:
                if within:
                    touching[change.block].add(layer)
                    if change.block not in born:
                        self._owner[change.block] = layer
                born.add(change.block)
        for block, layers in touching.items():
            if len(layers) == 1:
                self._owner.setdefault(block, *layers)
        for (micro_step, kind, layer), changes in self._segments.items():
            if kind in ("forward", "backward") and layer == MIDDLE:
                for change, twin in zip(changes, self._segments[micro_step, kind, _REPEATED], strict=True):
                    if self._owner.get(change.block) == MIDDLE and self._owned(twin.block):
                        self._twin.setdefault(change.block, twin.block)

    def _find_more_that_stands(self, shallow: Trace) -> None:
        more = Counter(standing[1:] for standing in self._standing)
        more.subtract(standing[1:] for standing in shallow.standing_blocks if standing.part is not Part.HOST)
        more.subtract(standing[1:] for standing in self._standing if self._owned(standing.block))
        if min(more.values(), default=0) < 0:
            raise StructureError("what stands does not grow by blocks of the same size")
        for standing in self._standing:
            if more[standing[1:]] > 0 and standing.block not in self._owner:
                more[standing[1:]] -= 1
                self._owner[standing.block] = _REPEATED

    def _find_more_outside_of_layers(self, shallow: Trace) -> None:
        for key, changes in self._segments.items():
            if key[1] in ("forward", "backward"):
                continue
            fewer = [change for change in _on_device(shallow.segments[key]) if change.bytes > 0]
            made = [change for change in changes if change.bytes > 0]
            sized = _matched(
                [(*_role(change), *line(change.bytes, shallow)) for change in fewer],
                [(*_role(change), *line(change.bytes, self._trace)) for change in made],
            )
            for tag, old, new in sized:
                if tag != "equal":
                    self._find_more(fewer[old], made[new])

    def _find_more(self, fewer: Sequence[Change], made: Sequence[Change]) -> None:
        """Of changes that differ: which are further ones, and which have grown."""
        for tag, old, new in _matched([_role(change) for change in fewer], [_role(change) for change in made]):
            if tag == "insert":
                self._owner |= {change.block: _REPEATED for change in made[new]}
            elif tag == "equal":
                grown = zip(fewer[old], made[new], strict=True)
                # As in `Structure.fit`: what differs for padded labels is no growth.
                self._growth |= {high.block: high.bytes - low.bytes for low, high in grown if high.part not in _FEW}
            else:
                raise StructureError(f"{fewer[old][0].operator} is missing in a deeper model")


def _role(change: Change) -> tuple[str, Part]:
    return change.operator, change.part


def _matched(fewer: Sequence[Any], more: Sequence[Any]) -> Iterator[tuple[str, slice, slice]]:
    """(how they compare, a part of the one, that of the other), in order."""
    for tag, begin, end, other, other_end in difflib.SequenceMatcher(None, fewer, more, autojunk=False).get_opcodes():
        yield tag, slice(begin, end), slice(other, other_end)


def _on_device(changes: Sequence[Change]) -> list[Change]:
    return [change for change in changes if change.part is not Part.HOST]
