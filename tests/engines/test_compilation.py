"""Compiled layers train like a plain loop, and their memory is counted to the byte. Compiling takes a minute."""

import contextlib
import gc
from typing import Any

import pytest
import torch
from torch._C._dynamo import guards
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from autotune.engines.engine import build_engine
from autotune.modeling.build import apply_activation_checkpointing, apply_compilation, build_model, materialize
from autotune.modeling.memory_tracker import MemoryTracker
from autotune.spec.request import TrialRequest
from tests.engines.parity import CPU, WORKLOAD, Ranks, Trace, assert_equal, plain_training, request, tiny, train


def test_buffers_of_compiled_code_are_counted_and_limited() -> None:
    allocate = vars(guards)["_empty_strided_cpu"]  # as compiled code keeps it
    with MemoryTracker(limit_bytes=5000) as tracker:
        buffer = allocate((1000,), (1,), torch.float32)
        assert tracker.live_bytes == 4000
        with pytest.raises(torch.OutOfMemoryError, match="Memory limit reached in compiled"):
            allocate((1000,), (1,), torch.float32)
        del buffer
        assert tracker.live_bytes == 0
    assert allocate((1000,), (1,), torch.float32).shape == (1000,)


def compiled(rank: int, trial: TrialRequest) -> tuple[Trace, int, int]:
    """The trace under a tracker, as trials have one; how many graphs were compiled, and how often one was broken."""
    counters.clear()
    with MemoryTracker():
        trace = train(rank, trial, build_engine)
    return trace, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


CASES: list[tuple[int, dict[str, Any]]] = [
    (3, {}),
    (0, {}),
    (2, {"activation_checkpointing": "full", "precision": "bf16"}),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "fields"), CASES)
def test_every_stage(ranks: Ranks, stage: int, fields: dict[str, Any]) -> None:
    loss_rtol, norm_rtol = (1e-3, 2e-2) if fields else (1e-4, 1e-4)
    trial = request("pytorch", stage, torch_compile=True, **fields)
    for trace, graphs, breaks in ranks.run(compiled, trial, seconds=500):
        assert_equal(trace, plain_training(tiny()), loss_rtol=loss_rtol, norm_rtol=norm_rtol)
        assert 0 < graphs <= 8  # one for all layers, and one for each module around them
        assert breaks == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_tracker_sees_what_the_allocator_gives(checkpointing: str) -> None:
    config = request("pytorch", 0, gpus=1, torch_compile=True, activation_checkpointing=checkpointing).config
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1))
    with MemoryTracker() as tracker:
        model = build_model(tiny(), "sdpa")
        apply_activation_checkpointing(model, config)
        apply_compilation(model, config)
        materialize(model, CPU, torch.float32, WORKLOAD.seed)
        for step in range(3):  # the profiler keeps tensors alive itself until it is warm
            gc.collect()  # else cycles that an earlier step left may die before this one is recorded
            tracker.reset_peak()
            before = tracker.live_bytes
            recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with recorded if step == 2 else contextlib.nullcontext():
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            peak = tracker.peak_bytes - before
            model.zero_grad()
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]  # None before it has run, and it has
    live, highest = 0, 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    assert peak == highest
