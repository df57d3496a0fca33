"""Small tensors by hand: which change is written down where, as what, and what stands in the end."""

from collections.abc import Iterator

import pytest
import torch

from autotune.predict.record import Recorder
from autotune.predict.segments import Change, Standing
from autotune.spec.prediction import Part

VOCABULARY = 512


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


def sizes(changes: tuple[Change, ...]) -> list[int]:
    return [change.bytes for change in changes]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder(VOCABULARY) as recorder:
        yield recorder


def test_a_change_belongs_to_the_segment_in_which_it_happens(recorder: Recorder) -> None:
    recorder.begin({})
    recorder.enter(0, "before")
    recorder.enter(0, "forward", 0)
    saved = filled(10)
    saved.view(5, 2)
    recorder.enter(0, "between")
    del saved
    recorder.enter(0, "backward", 0)
    filled(20)
    _, segments, _ = recorder.end()
    assert list(segments) == [(0, "before", 0), (0, "forward", 0), (0, "between", 0), (0, "backward", 0)]
    assert [sizes(changes) for changes in segments.values()] == [[], [40], [-40], [80, -80]]
    (made,), (freed,) = segments[0, "forward", 0], segments[0, "between", 0]
    assert (made.operator, freed.operator) == ("aten.ones.default", "free")
    assert made.block == freed.block
    assert made.block != segments[0, "backward", 0][0].block


def test_what_lives_at_the_beginning_stands(recorder: Recorder) -> None:
    weight, buffer = filled(100), filled(7)
    assert recorder.begin({Part.PARAMETERS: [weight, weight[:50]]}) == {Part.PARAMETERS: 400, Part.BUFFERS: 28}
    recorder.enter(0, "update")
    assert buffer.numel() == 7
    lasting, segments, standing = recorder.end()
    assert lasting == {}
    assert segments == {(0, "update", 0): ()}
    assert [block[1:] for block in standing] == [(400, Part.PARAMETERS), (28, Part.ACTIVATIONS)]


def test_what_is_kept_stands_and_what_is_given_up_does_not(recorder: Recorder) -> None:
    weight, old = filled(100), filled(9)
    recorder.begin({Part.PARAMETERS: [weight], Part.GRADIENTS: [old]})
    recorder.enter(0, "update")
    work = filled(3)
    state = filled(50)
    recorder.name_all({Part.OPTIMIZER_STATES: [state]})
    del old, work
    lasting, segments, standing = recorder.end()
    assert lasting == {Part.OPTIMIZER_STATES: 200, Part.GRADIENTS: -36}
    assert sizes(segments[0, "update", 0]) == [12, -12]
    assert [block[1:] for block in standing] == [(400, Part.PARAMETERS), (200, Part.OPTIMIZER_STATES)]


def test_what_is_given_up_and_comes_back_is_less_in_between(recorder: Recorder) -> None:
    gathered, other = filled(100), filled(30)
    recorder.begin({Part.PARAMETERS: [gathered], Part.GRADIENTS: [other]})
    recorder.enter(0, "update")
    del gathered, other
    work = filled(3)
    again, state = filled(100), filled(30)
    recorder.name_all({Part.PARAMETERS: [again], Part.OPTIMIZER_STATES: [state]})
    del work
    lasting, segments, standing = recorder.end()
    assert lasting == {Part.OPTIMIZER_STATES: 120, Part.GRADIENTS: -120}
    assert sizes(segments[0, "update", 0]) == [-400, 12, 400, -12]
    gone, _, back, _ = segments[0, "update", 0]
    assert gone.block == back.block == standing[0].block
    assert [block[1:] for block in standing] == [(400, Part.PARAMETERS), (120, Part.OPTIMIZER_STATES)]


def test_a_storage_that_is_resized_is_one_block(recorder: Recorder) -> None:
    gathered = filled(1000)
    storage = gathered.untyped_storage()
    storage.resize_(0)
    recorder.begin({})
    for layer in range(2):
        recorder.enter(0, "forward", layer)
        storage.resize_(4000)
        storage.resize_(0)
    _, segments, standing = recorder.end()
    assert standing == ()
    changes = [change for found in segments.values() for change in found]
    assert sizes(tuple(changes)) == [4000, -4000, 4000, -4000]
    assert len({change.block for change in changes}) == 1


def test_tensors_with_the_vocabularys_dimension_are_logits(recorder: Recorder) -> None:
    recorder.begin({})
    recorder.enter(0, "between")
    filled(2, VOCABULARY)
    filled(2, VOCABULARY - 1)
    _, segments, _ = recorder.end()
    parts = [change.part for change in segments[0, "between", 0]]
    assert parts == [Part.LOGITS, Part.LOGITS, Part.ACTIVATIONS, Part.ACTIVATIONS]


def test_a_name_holds_for_all_changes_of_a_block(recorder: Recorder) -> None:
    recorder.begin({})
    recorder.enter(0, "backward", 0)
    gradient = filled(8)
    recorder.name_all({Part.GRADIENTS: [gradient]})
    recorder.enter(0, "after")
    del gradient
    _, segments, _ = recorder.end()
    assert [change.part for found in segments.values() for change in found] == [Part.GRADIENTS, Part.GRADIENTS]


@pytest.mark.parametrize(
    ("on_host", "parts"),
    [(True, [Part.ACTIVATIONS, Part.HOST]), (False, [Part.ACTIVATIONS, Part.ACTIVATIONS])],
)
def test_an_offloaded_update_works_on_the_host(on_host: bool, parts: list[Part]) -> None:
    with Recorder(VOCABULARY, update_on_host=on_host) as recorder:
        recorder.begin({})
        for kind in ("after", "update"):
            recorder.enter(0, kind)
            filled(8)
        _, segments, _ = recorder.end()
    assert [found[0].part for found in segments.values()] == parts


@pytest.mark.parametrize(("double_bytes", "largest"), [(None, 8 * 1000), (8 * 250, 8 * 250), (8 * 9000, 8 * 9000)])
def test_the_largest_fp64_copy_is_recorded_as_it_would_be_in_a_deep_model(
    double_bytes: int | None, largest: int
) -> None:
    with Recorder(VOCABULARY, double_bytes=double_bytes) as recorder:
        recorder.begin({})
        recorder.enter(0, "update")
        for elements in (1000, 100):
            filled(elements, dtype=torch.bfloat16).double()
        filled(1000)
        _, segments, _ = recorder.end()
    doubles = [change for change in segments[0, "update", 0] if change.operator == "to fp64"]
    assert sizes(tuple(doubles)) == [largest, 800]
    assert sum(sizes(segments[0, "update", 0])) == 0


def test_standing_blocks_are_in_the_order_of_allocation(recorder: Recorder) -> None:
    kept = [filled(size) for size in (30, 10, 20)]
    recorder.begin({Part.PARAMETERS: kept})
    recorder.enter(0, "update")
    state = filled(5)
    recorder.name_all({Part.OPTIMIZER_STATES: [state]})
    _, _, standing = recorder.end()
    assert [block.bytes for block in standing] == [120, 40, 80, 20]
    assert all(isinstance(block, Standing) for block in standing)
