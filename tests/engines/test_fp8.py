"""Products in fp8, emulated on CPUs, train on every stage as the same modules do in a plain loop."""

import functools
from importlib.util import find_spec

import pytest
import torch
from accelerate.utils.ao import convert_model_to_fp8_ao
from torch.optim import AdamW

from autotune.engines.batches import micro_batch
from autotune.engines.engine import build_engine
from autotune.modeling.build import build_model, materialize
from tests.engines.parity import (
    CPU,
    STEPS,
    VOCAB,
    WORKLOAD,
    Ranks,
    Trace,
    assert_equal,
    plain_training,
    request,
    tiny,
    train,
)

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: '.[fp8]'")
EQUAL = 1e-5
"""Of the first step. In later ones a last digit of fp32 decides here and there how a value is rounded to fp8."""
LATER = {"loss_rtol": 2e-4, "norm_rtol": 2e-2}


@functools.cache
def plain_fp8() -> Trace:
    """One process, one micro-batch after another: each has scales of its own."""
    from torchao.float8 import Float8LinearConfig

    torch.set_num_threads(1)
    trial = request("pytorch", 0)
    model = build_model(tiny(), "sdpa")
    materialize(model, CPU, torch.float32, WORKLOAD.seed)
    convert_model_to_fp8_ao(model, config=Float8LinearConfig(emulate=True))
    optimizer = AdamW(model.parameters(), lr=WORKLOAD.learning_rate, weight_decay=0.0)
    trace = Trace([], [])
    parts = [(micro_step, rank) for micro_step in range(WORKLOAD.micro_steps(trial.config)) for rank in range(2)]
    for step in range(STEPS):
        mean = 0.0
        for micro_step, rank in parts:
            ids = micro_batch(trial.config, WORKLOAD, VOCAB, step=step, micro_step=micro_step, rank=rank)
            loss = model(input_ids=ids, labels=ids).loss / len(parts)
            loss.backward()
            mean += loss.item()
        trace.losses.append(mean)
        trace.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), WORKLOAD.max_gradient_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return trace


def first(trace: Trace) -> list[float]:
    return [trace.losses[0], trace.norms[0]]


def test_the_reference_is_another_than_that_without() -> None:
    without = plain_training(tiny())
    assert first(plain_fp8()) != pytest.approx(first(without), rel=20 * EQUAL)
    assert first(plain_fp8()) == pytest.approx(first(without), rel=0.02)


@pytest.mark.parametrize(
    ("stage", "checkpointing"),
    [(3, "full"), *(pytest.param(stage, "none", marks=pytest.mark.slow) for stage in (0, 2, 3))],
)
def test_every_stage(ranks: Ranks, stage: int, checkpointing: str) -> None:
    trial = request("pytorch", stage, fp8=True, activation_checkpointing=checkpointing)
    for trace in ranks.run(train, trial, build_engine):
        assert first(trace) == pytest.approx(first(plain_fp8()), rel=EQUAL)
        assert_equal(trace, plain_fp8(), **LATER)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_layers(ranks: Ranks) -> None:
    trial = request("pytorch", 3, fp8=True, torch_compile=True)
    for trace in ranks.run(train, trial, build_engine, seconds=500):
        assert first(trace) == pytest.approx(first(plain_fp8()), rel=10 * EQUAL)
        assert_equal(trace, plain_fp8(), **LATER)
