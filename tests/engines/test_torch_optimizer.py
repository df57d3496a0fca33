"""torchao's states of 8 bits train like the same optimizer in a plain loop, on sharded and split weights too.

The update is compiled, which takes seconds for each shape of a parameter's shard.
"""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from autotune.engines.engine import build_engine
from autotune.modeling.build import build_model, materialize
from autotune.modeling.memory_tracker import MemoryTracker
from autotune.spec.request import TrialRequest
from tests.engines.parity import CPU, WORKLOAD, Ranks, Trace, assert_equal, optimizer_steps, plain_steps, request, tiny
from tests.engines.parity import plain_training as plain_fp32
from tests.engines.test_layouts import trial
from tests.engines.test_methods import keep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: '.[adamw-torch-8bit]'"),
    pytest.mark.timeout(600),
]
OPTIMIZER = "adamw_torch_8bit"
EQUAL = 1e-5
"""Where each tensor is whole, as in the reference."""
SHARDS = 5e-4
"""Where a rank has a part of a tensor, whose blocks of 256 values are others; and too few values for 8 bits here and
there."""


@functools.cache
def plain_training() -> Trace:
    """One process, the whole global batch in one pass."""
    from torchao.optim import AdamW8bit

    torch.set_num_threads(1)
    model = build_model(tiny(), "eager")
    materialize(model, CPU, torch.float32, WORKLOAD.seed)
    return plain_steps(model, WORKLOAD.learning_rate, AdamW8bit)


def watched(rank: int, trial: TrialRequest) -> tuple[Trace, float]:
    """The trace, under a tracker as trials have one, and the share of the states' values that have 8 bits."""
    with MemoryTracker():
        engine: Any = build_engine(trial, CPU)
        trace = optimizer_steps(rank, trial, engine)
    states = [_local(state) for state in engine.living_tensors()["optimizer_states"]]
    short = sum(state.numel() for state in states if hasattr(state, "codes"))
    return trace, short / sum(state.numel() for state in states)


def _local(state: torch.Tensor) -> torch.Tensor:
    return state.to_local() if isinstance(state, DTensor) else state


def test_the_reference_is_another_than_that_of_fp32() -> None:
    with pytest.raises(AssertionError):
        assert_equal(plain_training(), plain_fp32(tiny()), loss_rtol=EQUAL, norm_rtol=EQUAL)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_stage(ranks: Ranks, stage: int) -> None:
    tolerance = SHARDS if stage else EQUAL
    for trace, short in ranks.run(watched, request("pytorch", stage, optimizer=OPTIMIZER), seconds=500):
        assert_equal(trace, plain_training(), loss_rtol=tolerance, norm_rtol=tolerance)
        assert short > 0.5


def test_checkpoints(ranks: Ranks, tmp_path: Path) -> None:
    assert all(ranks.run(keep, request("pytorch", 3, optimizer=OPTIMIZER), tmp_path, seconds=500))
    assert any(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("text", ["tp2", "tp2 chunked", "sp2 zero3", "pp2 1f1b"])
def test_layouts_of_two_ranks(ranks: Ranks, text: str) -> None:
    for trace, _ in ranks.run(watched, trial(text, 2, optimizer=OPTIMIZER), seconds=500):
        assert_equal(trace, plain_training(), loss_rtol=SHARDS, norm_rtol=SHARDS)


@pytest.mark.parametrize("text", ["tp2 zero3", "zero3 groups2", "tp2 pp2 1f1b"])
def test_layouts_of_four_ranks(four_ranks: Ranks, text: str) -> None:
    for trace, _ in four_ranks.run(watched, trial(text, 4, optimizer=OPTIMIZER), seconds=500):
        assert_equal(trace, plain_training(), loss_rtol=SHARDS, norm_rtol=SHARDS)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_mixed_precision(ranks: Ranks, stage: int) -> None:
    """The loss's tolerance is that of `test_parity.py`. In the fourth step, where states of 8 bits lead to a norm 3.7 %
    from that of fp32 states, bf16 decides here and there how a state is rounded: norms were up to 3.9 % off.
    """
    for trace, _ in ranks.run(watched, request("pytorch", stage, optimizer=OPTIMIZER, precision="bf16"), seconds=500):
        assert_equal(trace, plain_training(), loss_rtol=1e-3, norm_rtol=5e-2)
