"""States of 8 bits train like the same optimizer in a plain loop, on every engine and stage that takes it."""

import functools
from typing import Any

import bitsandbytes
import pytest
import torch

from autotune.engines.engine import build_engine
from autotune.modeling.build import build_model, materialize
from autotune.spec.request import TrialRequest
from tests.engines.parity import CPU, WORKLOAD, Ranks, Trace, assert_equal, optimizer_steps, plain_steps, request, tiny
from tests.engines.parity import plain_training as plain_fp32
from tests.engines.test_layouts import auto_tensor

EQUAL = 1e-5
"""Where each tensor is whole, as in the reference: fp32 states lead to norms that are 4e-5 off."""
OTHER_BLOCKS = 5e-4
"""Where DeepSpeed cuts flat tensors into blocks of 256 values elsewhere."""


@functools.cache
def plain_training() -> Trace:
    """One process, the whole global batch in one pass."""
    torch.set_num_threads(1)
    model = build_model(tiny(), "eager")
    materialize(model, CPU, torch.float32, WORKLOAD.seed)
    return plain_steps(model, WORKLOAD.learning_rate, functools.partial(bitsandbytes.optim.AdamW, optim_bits=8))


def watched(rank: int, trial: TrialRequest) -> tuple[Trace, float]:
    """The trace, and the share of the states' values that have 8 bits."""
    engine: Any = build_engine(trial, CPU)
    trace = optimizer_steps(rank, trial, engine)
    states = {id(state): state for state in engine.living_tensors()["optimizer_states"]}.values()
    short = sum(state.numel() for state in states if state.dtype == torch.uint8)
    return trace, short / sum(state.numel() for state in states)


def test_the_reference_is_another_than_that_of_fp32() -> None:
    with pytest.raises(AssertionError):
        assert_equal(plain_training(), plain_fp32(tiny()), loss_rtol=EQUAL, norm_rtol=EQUAL)


@pytest.mark.parametrize(
    ("engine", "stage"),
    [
        ("pytorch", 0),
        ("deepspeed", 2),
        *(pytest.param("deepspeed", stage, marks=pytest.mark.slow) for stage in (0, 1, 3)),
    ],
)
def test_every_stage(ranks: Ranks, engine: str, stage: int) -> None:
    tolerance = EQUAL if stage == 0 else OTHER_BLOCKS
    for trace, short in ranks.run(watched, request(engine, stage, optimizer="adamw_8bit")):
        assert_equal(trace, plain_training(), loss_rtol=tolerance, norm_rtol=tolerance)
        assert short > 0.8  # the rest are scales, and the states of small tensors


@pytest.mark.slow
def test_shared_sequences_of_deepspeed(ranks: Ranks) -> None:
    trial = request("deepspeed", 3, sequence_parallel_size=2, optimizer="adamw_8bit")
    for trace in ranks.run(auto_tensor, trial):
        assert_equal(trace, plain_training(), loss_rtol=OTHER_BLOCKS, norm_rtol=OTHER_BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "stage"), [("pytorch", 0), *(("deepspeed", stage) for stage in range(4))])
def test_mixed_precision(ranks: Ranks, engine: str, stage: int) -> None:
    """The tolerances of `test_parity.py`."""
    loss_rtol, norm_rtol = (1e-2, 0.1) if (engine, stage) == ("deepspeed", 0) else (1e-3, 2e-2)
    for trace, _ in ranks.run(watched, request(engine, stage, optimizer="adamw_8bit", precision="bf16")):
        assert_equal(trace, plain_training(), loss_rtol=loss_rtol, norm_rtol=norm_rtol)
