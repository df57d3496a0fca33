"""LoRA trains like a plain loop with adapters written out by hand, on every engine and stage.

The reference shares nothing with the engines, nor with PEFT, but the weights that both begin with and the batch.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch.nn import functional

from autotune.engines.engine import build_engine
from autotune.engines.pytorch import PyTorchEngine
from autotune.modeling.build import apply_method, build_model, initial_weight, materialize
from autotune.spec.adapters import ADAPTED_MODEL_TYPES, adapted_matrices, trainable_parameters
from autotune.spec.config import LoraTargets
from autotune.spec.model import ModelSpec
from autotune.spec.request import TrialRequest
from tests.engines.parity import (
    CPU,
    STEPS,
    WORKLOAD,
    Ranks,
    Trace,
    assert_equal,
    few,
    optimizer_steps,
    plain_steps,
    tiny,
    train,
)
from tests.engines.parity import request as full_request
from tests.engines.test_layouts import auto_tensor, layout

RANK, ALPHA = 4, 8
# Adapters begin with B = 0, where A has no gradient: B has to move before a wrong gradient of A can be seen.
RATE = 2e-2
STEADY_RATE = 2e-3
"""At which rounding to bf16 does not change where four steps lead."""
ADAPTERS: dict[str, Any] = {
    "method": "lora",
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
    "lora_target_modules": "all-linear",
}


def request(engine: str, stage: int, rate: float = RATE, **fields: Any) -> TrialRequest:
    trial = full_request(engine, stage, **{**ADAPTERS, **fields})
    return dataclasses.replace(trial, workload=dataclasses.replace(WORKLOAD, learning_rate=rate))


def laid_out(text: str, gpus: int, rate: float = RATE, **more: Any) -> TrialRequest:
    """A trial of a layout such as `tp2 full`."""
    fields = layout(text)
    return request("pytorch", fields.pop("zero_stage"), rate, gpus=gpus, **fields, **more)


class ByHand(torch.nn.Module):
    """W·x + alpha / rank · B·A·x."""

    def __init__(self, base: torch.nn.Linear, name: str, packed: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        if packed:  # into 4 bits and out again
            bits = quantize_4bit(base.weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            self.base.weight.copy_(dequantize_4bit(*bits))
        self.a = self._parameter(f"{name}.lora_A.default.weight", (RANK, base.in_features))
        self.b = self._parameter(f"{name}.lora_B.default.weight", (base.out_features, RANK))

    def _parameter(self, name: str, shape: tuple[int, int]) -> torch.nn.Parameter:
        return torch.nn.Parameter(initial_weight(name, shape, CPU, 0.02, WORKLOAD.seed))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        adapted = functional.linear(functional.linear(inputs, self.a), self.b)
        return functional.linear(inputs, self.base.weight) + ALPHA / RANK * adapted


@functools.cache
def plain_training(targets: LoraTargets = "all-linear", rate: float = RATE, packed: bool = False) -> Trace:
    """One process, the whole global batch in one pass."""
    torch.set_num_threads(1)
    model = build_model(tiny(), "eager")
    materialize(model, CPU, torch.float32, WORKLOAD.seed)
    model.requires_grad_(False)
    names = adapted_matrices(tiny(), targets)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in names:
            assert isinstance(module, torch.nn.Linear)
            model.set_submodule(name, ByHand(module, name, packed))
    return plain_steps(model, rate)


STAGES = [("deepspeed", stage) for stage in range(4)] + [("pytorch", stage) for stage in (0, 2, 3)]
DEFAULT = [("deepspeed", 2), ("deepspeed", 3), ("pytorch", 0), ("pytorch", 3)]


def test_reference_moves() -> None:
    assert len(set(plain_training().losses)) == STEPS
    assert plain_training().norms[0] > WORKLOAD.max_gradient_norm


@pytest.mark.parametrize(("engine", "stage"), few(STAGES, DEFAULT))
def test_every_stage(ranks: Ranks, engine: str, stage: int) -> None:
    for trace in ranks.run(train, request(engine, stage, activation_checkpointing="full"), build_engine):
        assert_equal(trace, plain_training())


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["attention", "mlp"])
@pytest.mark.parametrize(("engine", "stage"), STAGES)
def test_targets_and_accumulation(ranks: Ranks, engine: str, stage: int, targets: LoraTargets) -> None:
    trial = request(engine, stage, lora_target_modules=targets, micro_batch_size=1)
    for trace in ranks.run(train, trial, build_engine):
        assert_equal(trace, plain_training(targets))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "optimizer+parameters")]
)
def test_offload(ranks: Ranks, stage: int, offload: str) -> None:
    for trace in ranks.run(train, request("deepspeed", stage, offload=offload), build_engine):
        assert_equal(trace, plain_training())


@pytest.mark.parametrize(("engine", "stage"), few(STAGES, [("pytorch", 3), ("deepspeed", 3)]))
def test_mixed_precision(ranks: Ranks, engine: str, stage: int) -> None:
    """The tolerances of `test_parity.py`; frozen weights are bf16 here, not only the products."""
    trial = request(engine, stage, STEADY_RATE, precision="bf16")
    loss_rtol, norm_rtol = (1e-2, 0.1) if (engine, stage) == ("deepspeed", 0) else (1e-3, 2e-2)
    for trace in ranks.run(train, trial, build_engine):
        assert_equal(trace, plain_training(rate=STEADY_RATE), loss_rtol=loss_rtol, norm_rtol=norm_rtol)


TWO = [
    "zero3 chunked",
    "tp2 full",
    "sp2 zero3",
    "pp2 1f1b full",
    "tp2 chunked",
    "sp2 zero0",
    "pp2 interleaved_1f1b mb1",
]
FOUR = ["tp2 zero3 full", "sp4 zero3", "tp2 sp2 zero2 chunked", "pp2 1f1b tp2 full", "pp2 1f1b sp2", "pp4 1f1b mb1"]


@pytest.mark.parametrize("text", few(TWO, ["sp2 zero0", "pp2 1f1b full"]))
def test_layouts_of_two_ranks(ranks: Ranks, text: str) -> None:
    for trace in ranks.run(train, laid_out(text, 2), build_engine):
        assert_equal(trace, plain_training())


SHORT = [
    "pp2 1f1b full",
    "pp2 interleaved_1f1b mb1",
    "pp2 zero_bubble",
    "tp2",
    "sp2 zero0",
    "zero3 chunked",
]


@pytest.mark.parametrize("text", few(SHORT, SHORT[:1]))
def test_layouts_in_mixed_precision(ranks: Ranks, text: str) -> None:
    """Frozen weights are bf16, and so is what stages of a pipeline send each other."""
    for trace in ranks.run(unwritten_is_nan, laid_out(text, 2, STEADY_RATE, precision="bf16")):
        assert_equal(trace, plain_training(rate=STEADY_RATE), loss_rtol=1e-3, norm_rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["pp2 1f1b", "pp2 zero_bubble full"])
def test_pipelines_with_weights_in_4_bits(ranks: Ranks, text: str) -> None:
    for trace in ranks.run(unwritten_is_nan, laid_out(text, 2, STEADY_RATE, method="qlora", precision="bf16")):
        assert_equal(trace, plain_training(packed=True, rate=STEADY_RATE), loss_rtol=1e-3, norm_rtol=2e-2)


def unwritten_is_nan(rank: int, trial: TrialRequest) -> Trace:
    """A trace that is nan if memory was read that nobody had written: as a rule that is zeros, which hides it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    return train(rank, trial, build_engine)


@pytest.mark.slow
@pytest.mark.parametrize("text", FOUR)
def test_layouts_of_four_ranks(four_ranks: Ranks, text: str) -> None:
    for trace in four_ranks.run(train, laid_out(text, 4), build_engine):
        assert_equal(trace, plain_training())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_shared_sequences_of_deepspeed(ranks: Ranks, checkpointing: str) -> None:
    trial = request("deepspeed", 3, sequence_parallel_size=2, activation_checkpointing=checkpointing)
    for trace in ranks.run(auto_tensor, trial):
        assert_equal(trace, plain_training())


PACKED = [("deepspeed", stage) for stage in range(3)] + [("pytorch", 0)]


@pytest.mark.parametrize(("engine", "stage"), few(PACKED, [("deepspeed", 2), ("pytorch", 0)]))
def test_weights_in_4_bits(ranks: Ranks, engine: str, stage: int) -> None:
    trial = request(engine, stage, method="qlora", activation_checkpointing="full")
    for trace in ranks.run(train, trial, build_engine):
        assert_equal(trace, plain_training(packed=True))


@pytest.mark.parametrize(("engine", "method"), [("pytorch", "lora"), ("pytorch", "qlora"), ("deepspeed", "qlora")])
def test_checkpoints(ranks: Ranks, tmp_path: Path, engine: str, method: str) -> None:
    assert all(ranks.run(keep, request(engine, 0, method=method), tmp_path))
    assert any(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())


def keep(rank: int, trial: TrialRequest, folder: Path) -> bool:
    trained = build_engine(trial, CPU)
    optimizer_steps(rank, trial, trained)
    trained.save(folder)
    return True


class WithoutA(PyTorchEngine):
    """Forgets that A trains."""

    def update(self) -> None:
        for name, parameter in self.named_parameters():
            if ".lora_A." in name:
                parameter.grad = None
        super().update()


def test_a_wrong_engine_is_found(ranks: Ranks) -> None:
    trace = ranks.run(train, request("pytorch", 0), WithoutA)[0]
    with pytest.raises(AssertionError):
        assert_equal(trace, plain_training())


@pytest.mark.parametrize("model_type", ADAPTED_MODEL_TYPES)
@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp"])
def test_the_formula_counts_what_peft_adds(model_type: str, targets: LoraTargets) -> None:
    spec = ModelSpec(name=model_type, config={**tiny().config, "model_type": model_type})
    trial = request("pytorch", 0, lora_target_modules=targets)
    model = build_model(spec, "sdpa")
    apply_method(model, trial.config)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == trainable_parameters(spec, trial.config)
    assert all(".lora_" in name for name in trained)
