"""What the allocator reserves for a repeated layer against a replay of the deep model's own allocations."""

import dataclasses

import numpy as np
import pytest

from autotune.predict.allocator import replay
from autotune.predict.reserved import Event, deep_step_of, fragmentation, step_of
from autotune.predict.segments import (
    CHECKED_BATCH,
    CHECKED_LENGTH,
    TRACED_BATCH,
    TRACED_LAYERS,
    TRACED_LENGTH,
    Change,
    Key,
    Standing,
    StructureError,
    Trace,
    quantities,
)
from autotune.predict.stream import REPLAYED_BATCH, REPLAYED_TOKENS
from autotune.predict.structure import Structure
from autotune.predict.trace import record_trace
from autotune.spec.config import TrialConfig
from autotune.spec.prediction import Part
from autotune.units import MIB
from tests.predict.test_trace import DEEP, a_config

DEPTH = 7


def peak(events: list[Event], batch: int, length: int) -> float:
    """Highest live bytes."""
    lines = np.array([line for _, line in events])
    return float((lines @ quantities(np.array([batch]), np.array([length]))[0]).cumsum().max())


@pytest.mark.parametrize(
    ("config", "accumulates"),
    [
        (a_config("pytorch", 3), True),
        pytest.param(a_config("pytorch", 2, "none"), True, marks=pytest.mark.slow),
        pytest.param(a_config("pytorch", 3, "none"), False, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.describe() if isinstance(value, TrialConfig) else f"accumulates-{value}",
)
def test_a_repeated_layer_reserves_what_the_deep_model_does(config: TrialConfig, accumulates: bool) -> None:
    def record(layers: int, batch: int, length: int) -> Trace:
        return record_trace(DEEP, config, layers, batch, length, accumulates=accumulates)

    shallow = record(TRACED_LAYERS, TRACED_BATCH, TRACED_LENGTH)
    deeper = record(TRACED_LAYERS + 1, CHECKED_BATCH, CHECKED_LENGTH)
    repeated = deep_step_of(shallow, deeper, DEPTH)
    whole = step_of(record(DEPTH, TRACED_BATCH, TRACED_LENGTH))
    assert len(repeated) == len(whole)
    assert fragmentation(repeated) == pytest.approx(fragmentation(whole), rel=0.02)
    stream = Structure.fit(shallow, deeper).stream(DEPTH)
    for batch, length in ((2, 512), (3, 4096)):
        highest = stream.peak_bytes(np.array([batch]), np.array([length]), "cuda")[0]
        assert peak(repeated, batch, length) == pytest.approx(highest, rel=1e-3)


def a_trace(*changes: tuple[int, int, Part], standing: tuple[Standing, ...] = ()) -> Trace:
    made = tuple(Change("make" if size > 0 else "free", size, part, block) for block, size, part in changes)
    return Trace(1, TRACED_BATCH, TRACED_LENGTH, {}, {(0, "before", 0): made}, standing)


def test_fragmentation_is_what_the_allocator_reserves_beyond_the_peak() -> None:
    """5 MiB that stand, then 15 MiB: they share a segment of 20 MiB."""
    trace = a_trace(
        (1, 15 * MIB, Part.LOGITS), (1, -15 * MIB, Part.LOGITS), standing=(Standing(0, 5 * MIB, Part.PARAMETERS),)
    )
    assert fragmentation(step_of(trace)).tolist() == [0.0] * len(REPLAYED_TOKENS)
    alone = a_trace((1, 15 * MIB, Part.LOGITS))
    assert fragmentation(step_of(alone)).tolist() == [1.0 * MIB] * len(REPLAYED_TOKENS)  # whole 2 MiB


def test_sizes_that_grow_with_tokens_are_replayed_at_each_size() -> None:
    per_token = 10_000
    trace = a_trace((1, per_token * TRACED_BATCH * TRACED_LENGTH, Part.ACTIVATIONS))
    expected = []
    for tokens in REPLAYED_TOKENS:
        size = per_token * tokens
        expected.append(replay(np.array([1]), np.array([size])).reserved_peak_bytes - size)
    assert fragmentation(step_of(trace)).tolist() == expected
    assert all(tokens % REPLAYED_BATCH == 0 for tokens in REPLAYED_TOKENS)


def test_what_is_on_the_host_is_not_the_allocators() -> None:
    trace = a_trace((1, 100 * MIB, Part.HOST), (1, -100 * MIB, Part.HOST), standing=(Standing(0, 64 * MIB, Part.HOST),))
    assert step_of(trace) == []
    assert fragmentation([]).tolist() == [0.0] * len(REPLAYED_TOKENS)


def test_an_update_in_portions_makes_smaller_blocks() -> None:
    trace = a_trace((1, 8 * MIB, Part.GRADIENTS))
    updated = dataclasses.replace(
        trace,
        segments={
            **trace.segments,
            (0, "update", 0): (
                Change("copy", 40 * MIB, Part.GRADIENTS, 2),
                Change("free", -8 * MIB, Part.GRADIENTS, 1),
                Change("free", -40 * MIB, Part.GRADIENTS, 2),
            ),
        },
    )
    constants = [(block, line[0] / MIB) for block, line in step_of(updated, update_share=0.25)]
    assert constants == [(1, 8.0), (2, 10.0), (1, -8.0), (2, -10.0)]


def layered(layers: int) -> Trace:
    """Each layer saves a block that its backward pass frees, makes one for the next layer, and a gradient."""
    saved, output, gradient = 100, 200, 300
    segments: dict[Key, tuple[Change, ...]] = {}
    standing = tuple(Standing(block, size, Part.PARAMETERS) for block, size in enumerate([4096, *[512] * layers]))
    for layer in range(layers):
        made = [
            Change("save", 1024, Part.ACTIVATIONS, saved + layer),
            Change("make", 2048, Part.ACTIVATIONS, output + layer),
        ]
        freed = [Change("free", -2048, Part.ACTIVATIONS, output + layer - 1)] if layer else []
        segments[0, "forward", layer] = (*made, *freed)
    segments[0, "between", 0] = (Change("free", -2048, Part.ACTIVATIONS, output + layers - 1),)
    for layer in reversed(range(layers)):
        segments[0, "backward", layer] = (
            Change("make", 512, Part.GRADIENTS, gradient + layer),
            Change("free", -1024, Part.ACTIVATIONS, saved + layer),
        )
    update = [Change("work", 512, Part.GRADIENTS, 400 + layer) for layer in range(layers)]
    segments[0, "update", 0] = (
        *update,
        Change("stack", 4 * layers, Part.GRADIENTS, 500),
        Change("free", -4 * layers, Part.GRADIENTS, 500),
        *(Change("free", -512, Part.GRADIENTS, change.block) for change in reversed(update)),
        *(Change("free", -512, Part.GRADIENTS, gradient + layer) for layer in range(layers)),
    )
    return Trace(layers, TRACED_BATCH, TRACED_LENGTH, {}, segments, standing)


@pytest.mark.parametrize("layers", [4, 5, 9])
def test_copies_free_their_own_blocks_and_their_neighbours(layers: int) -> None:
    repeated = deep_step_of(layered(TRACED_LAYERS), layered(TRACED_LAYERS + 1), layers)
    whole = step_of(layered(layers))
    assert sorted(line for _, line in repeated) == sorted(line for _, line in whole)
    live: set[int] = set()
    for block, line in repeated:
        assert (line[0] > 0) == (block not in live)
        live ^= {block}
    assert len(live) == 1 + layers  # what stood at the beginning
    assert peak(repeated, 1, 1) == peak(whole, 1, 1)


def test_blocks_that_the_first_layer_makes_for_each_other_cannot_be_repeated() -> None:
    trace = layered(TRACED_LAYERS + 1)
    made = tuple(Change("ahead", 512, Part.BUFFERS, 600 + layer) for layer in range(3))
    segments = {
        key: (*made, *changes) if key == (0, "forward", 0) else changes for key, changes in trace.segments.items()
    }
    for layer in range(3):
        freed = Change("free", -512, Part.BUFFERS, 600 + layer)
        segments[0, "backward", layer] = (*segments[0, "backward", layer], freed)
    with pytest.raises(StructureError, match="a repeated layer does not find its block"):
        deep_step_of(layered(TRACED_LAYERS), dataclasses.replace(trace, segments=segments), 9)


def test_what_stands_must_grow_block_by_block() -> None:
    flat = dataclasses.replace(layered(TRACED_LAYERS), standing_blocks=(Standing(0, 9999, Part.PARAMETERS),))
    with pytest.raises(StructureError, match="what stands does not grow"):
        deep_step_of(flat, layered(TRACED_LAYERS + 1), 9)
