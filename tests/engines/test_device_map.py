"""One process with layers on several devices trains as a plain loop does; on a CPU the devices are all one."""

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

import autotune.engines.device_map
from autotune.engines.device_map import SpreadEngine
from autotune.engines.engine import build_engine
from autotune.modeling.build import checkpointed_layers
from autotune.modeling.memory_tracker import MemoryTracker
from autotune.predict.fake import fake_trial
from autotune.spec.request import TrialRequest
from tests.engines.parity import CPU, Ranks, Trace, assert_equal, optimizer_steps, train
from tests.engines.test_methods import STEADY_RATE, plain_training, request


def spread(rate: float | None = None, **fields: Any) -> TrialRequest:
    rates = () if rate is None else (rate,)
    return request("pytorch", 0, *rates, device_map="auto", **fields)


def hooked(rank: int, trial: TrialRequest) -> tuple[Trace, int, set[str]]:
    """The steps, how many layers have a hook of their own, and the kinds of what adapters are hooked by."""
    engine = build_engine(trial, CPU)
    assert isinstance(engine, SpreadEngine)
    model = engine._model
    layers = [layer for layer in checkpointed_layers(model) if isinstance(layer._hf_hook, AlignDevicesHook)]
    adapters = [module for name, module in model.named_modules() if ".lora_" in name]
    kinds = {type(getattr(module, "_hf_hook", None)).__name__ for module in adapters}
    return optimizer_steps(rank, trial, engine), len(layers), kinds


# Both ranks are such a process, each with the whole batch.
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_it_trains_as_a_plain_loop(ranks: Ranks, checkpointing: str) -> None:
    for trace, layers, kinds in ranks.run(hooked, spread(activation_checkpointing=checkpointing)):
        assert_equal(trace, plain_training())
        assert layers == 4
        assert kinds == {"NoneType"}


def test_weights_in_4_bits(ranks: Ranks) -> None:
    for trace in ranks.run(train, spread(method="qlora", micro_batch_size=1), build_engine):
        assert_equal(trace, plain_training(packed=True))


def test_mixed_precision(ranks: Ranks) -> None:
    trial = spread(STEADY_RATE, precision="bf16", activation_checkpointing="full")
    for trace in ranks.run(train, trial, build_engine):
        assert_equal(trace, plain_training(rate=STEADY_RATE), loss_rtol=1e-3, norm_rtol=2e-2)


FIELDS: list[dict[str, Any]] = [
    {"precision": "bf16", "activation_checkpointing": "full", "gpus": 4},
    {"precision": "bf16", "method": "qlora"},
    {"precision": "bf16", "batching": "padded", "activation_checkpointing": "selective", "selective_every": 2},
    {"precision": "bf16", "batching": "packed", "activation_checkpointing": "selective_ops"},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_no_operator_mixes_devices(fields: dict[str, Any]) -> None:
    """On FakeTensors, which know as many devices as there are numbers, and refuse to mix them."""
    trial = spread(**fields)
    numbers = range(trial.config.gpus)
    with fake_trial(trial, MemoryTracker()) as fake:
        fake.run([False, True, True])
        engine = fake.engine
        assert isinstance(engine, SpreadEngine)
        at = [layer.mlp.down_proj.weight.device.index or 0 for layer in checkpointed_layers(engine._model)]
        assert at == sorted(at)
        assert set(at) <= set(numbers)
        assert len(set(at)) > 1
        trained = [p for p in engine._model.parameters() if p.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.float32}
        assert {p.device for p in trained} == {p.device for p in engine._model.parameters() if "cpu" in str(p.device)}


def test_without_hooks_operators_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune.engines.device_map, "spread", lambda *args: None)
    with (
        fake_trial(spread(precision="bf16"), MemoryTracker()) as fake,
        pytest.raises(FakeTensorDeviceMismatchError, match="cpu:1"),
    ):
        fake.run([True])
