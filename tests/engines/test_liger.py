"""Liger's kernels train like a plain loop on every engine and stage, and what stands for them in a trace is like them.

The kernels are Liger's own, interpreted: that they are right on a GPU is not shown here. What is shown is that engines
hand them what they need, above all the weight of the head, which Liger reads past the module that gathers it.
"""

import gc
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from autotune.engines.batches import micro_batch
from autotune.engines.engine import build_engine
from autotune.modeling.memory_tracker import MemoryTracker
from autotune.predict import liger
from autotune.spec.request import TrialRequest
from tests.engines.parity import (
    CPU,
    SMALL_BUCKETS,
    VOCAB,
    Ranks,
    RankServer,
    Trace,
    assert_equal,
    optimizer_steps,
    plain_training,
    request,
    tiny,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel: '.[liger]'"),
]
PARTITIONED = {**dict(SMALL_BUCKETS), "zero_optimization.stage3_param_persistence_threshold": 0}
"""Of ZeRO-3: small parameters too, as the head of a large model is."""


@pytest.fixture(scope="module")
def interpreting() -> Iterator[Ranks]:
    """Ranks of their own, which run Triton's kernels and have Liger's rotary embeddings from the start."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        server = RankServer(preload=["tests.engines.liger_on_cpu"])
    yield Ranks(server, 2)
    server.stop()


def trained(rank: int, trial: TrialRequest) -> tuple[Trace, float]:
    """The trace, and the loss of an evaluation after it."""
    engine = build_engine(trial, CPU)
    trace = optimizer_steps(rank, trial, engine)
    ids = micro_batch(trial.config, trial.workload, VOCAB, step=0, micro_step=0, rank=rank)
    return trace, engine.evaluate(ids).item()


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("pytorch", 3, {}),
    ("pytorch", 3, {"tied": True}),
    ("pytorch", 0, {"activation_checkpointing": "selective", "selective_every": 2}),
    ("pytorch", 2, {"offload": "optimizer+parameters"}),
    ("deepspeed", 0, {}),
    ("deepspeed", 2, {"activation_checkpointing": "full"}),
    ("deepspeed", 3, {"deepspeed": PARTITIONED}),
    ("deepspeed", 3, {"deepspeed": PARTITIONED, "tied": True, "activation_checkpointing": "full"}),
]


@pytest.mark.parametrize(("engine", "stage", "fields"), CASES)
def test_every_stage(interpreting: Ranks, engine: str, stage: int, fields: dict[str, Any]) -> None:
    reference = plain_training(tiny(bool(fields.get("tied"))))
    trial = request(engine, stage, use_liger_kernel=True, **fields)
    for trace, evaluated in interpreting.run(trained, trial, seconds=250):
        assert_equal(trace, reference)
        assert 0 < evaluated < reference.losses[0]


def footprints(rank: int) -> list[tuple[str, list[int], list[int]]]:
    """Of each of Liger's functions, and of what stands for it."""
    from liger_kernel import ops

    hidden, gate = torch.randn(2, 96, 64), torch.randn(2, 96, 160)
    queries, keys, angles = torch.randn(2, 96, 4, 16), torch.randn(2, 96, 2, 16), torch.randn(1, 96, 16)
    loss = [hidden.view(-1, 64), torch.randn(512, 64), torch.randint(0, 512, (192,))]
    cases: list[tuple[Any, Any, list[torch.Tensor], tuple[Any, ...]]] = [
        (ops.LigerRMSNormFunction, liger._RMSNorm, [hidden, torch.ones(64)], (1e-6,)),
        (ops.LigerRopeFunction, liger._Rope, [queries, keys, angles, angles.clone()], ()),
        (ops.LigerSiLUMulFunction, liger._SiLUMul, [gate, gate.clone()], ()),
        (ops.LigerFusedLinearCrossEntropyFunction, liger._FusedLinearCrossEntropy, loss, ()),
    ]
    return [
        (theirs.__name__, footprint(theirs, given, more), footprint(ours, given, ()))
        for theirs, ours, given, more in cases
    ]


def footprint(function: Any, given: list[torch.Tensor], more: tuple[Any, ...]) -> list[int]:
    """Bytes that live after the forward pass, that the backward pass has besides at most, and that live after it."""
    leaves = [value.clone().requires_grad_(at < 2) for at, value in enumerate(given)]
    with MemoryTracker() as tracker:
        # What Liger writes over may be no leaf. Heads lie by tokens, as projections make them.
        inputs = [value.transpose(1, 2) if value.dim() == 4 else value for value in (leaf * 1 for leaf in leaves)]
        before = tracker.live_bytes
        outputs = function.apply(*inputs, *more)
        outputs = [value for value in (outputs if isinstance(outputs, tuple) else (outputs,)) if value is not None]
        gc.collect()  # the interpreter's own cycles hold what a kernel was given
        kept = tracker.live_bytes - before
        gradients = [torch.ones_like(value) for value in outputs]
        tracker.reset_peak()
        before = tracker.live_bytes
        torch.autograd.backward(outputs, gradients)
        return [kept, tracker.peak_bytes - before, tracker.live_bytes - before]


def test_stand_ins_allocate_and_save_the_same(interpreting: Ranks) -> None:
    found, _ = interpreting.run(footprints)
    for name, theirs, ours in found:
        assert ours == pytest.approx(theirs, rel=0.01, abs=1024), name
