"""Step times with frozen weights: no work for gradients that nobody needs, and that of the adapters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.predict.roofline import TimePart
from autotune.predict.shape import read_shape
from autotune.predict.step import TimePrediction
from autotune.predict.throughput import predict_trials
from autotune.predict.trials import Trials
from autotune.spec.adapters import flops_per_token, trainable_parameters
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from tests.samples import sample_space

MODEL = load_model("Qwen/Qwen3-32B", Path())
SHAPE = read_shape(MODEL.name, MODEL.config)
CLUSTER = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
ADAPTED: dict[str, Any] = {"method": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"}


def config(**fields: Any) -> TrialConfig:
    given = {"engine": "pytorch", "gpus": 8, "zero_stage": 3, "micro_batch_size": 1, "sequence_length": 4096}
    return TrialConfig.from_dict({**given, **fields})


def times(trial: TrialConfig) -> TimePrediction:
    return predict_trials(SHAPE, Trials.of([trial], Workload(global_batch_size=64), SHAPE), CLUSTER).at(0)


@pytest.mark.parametrize("engine", ["pytorch", "deepspeed"])
def test_frozen_weights_save_what_their_gradients_cost(engine: str) -> None:
    full, lora = times(config(engine=engine)), times(config(engine=engine, **ADAPTED))
    # Two products a weight in place of three, and those of the adapters, which are small but many.
    matmul = lora.breakdown[TimePart.MATMUL] / full.breakdown[TimePart.MATMUL]
    assert 2 / 3 < matmul < 0.8
    for part in (TimePart.GRADIENT_REDUCTION, TimePart.OPTIMIZER, TimePart.ACCUMULATION):
        assert lora.breakdown[part] < 0.05 * full.breakdown[part]
    # The frozen weights are gathered all the same.
    assert lora.breakdown[TimePart.PARAMETER_GATHER] >= 0.9 * full.breakdown[TimePart.PARAMETER_GATHER]
    assert lora.step_time_seconds < full.step_time_seconds


def test_more_and_wider_adapters_cost_more() -> None:
    few = times(config(**{**ADAPTED, "lora_target_modules": "attention"})).step_time_seconds
    all_matrices = times(config(**ADAPTED)).step_time_seconds
    wide = times(config(**{**ADAPTED, "lora_rank": 256})).step_time_seconds
    assert few < all_matrices < wide


def test_weights_in_4_bits_are_written_out_for_each_pass() -> None:
    plain, packed = times(config(**ADAPTED)), times(config(**{**ADAPTED, "method": "qlora"}))
    moved = packed.breakdown[TimePart.ELEMENTWISE] - plain.breakdown[TimePart.ELEMENTWISE]
    # Eight micro-batches, two passes, some 2.5 bytes of each of 31 B weights, at some 3 TB/s.
    assert moved == pytest.approx(8 * 2 * 2.52 * 31.2e9 / 3e12, rel=0.3)


@pytest.mark.parametrize("changes", [{}, ADAPTED, {**ADAPTED, "lora_target_modules": "mlp", "method": "qlora"}])
def test_flops_are_those_of_the_spec(changes: dict[str, Any]) -> None:
    trial = config(**changes)
    found = predict_trials(SHAPE, Trials.of([trial], Workload(global_batch_size=64), SHAPE), CLUSTER)
    assert found.flops_per_token[0] == pytest.approx(flops_per_token(MODEL, trial))


def test_flops_by_hand() -> None:
    trial = config(**ADAPTED)
    weights = MODEL.flops_per_token(0) / 6
    attention = MODEL.flops_per_token(4096) - 6 * weights
    assert flops_per_token(MODEL, trial) == pytest.approx(4 * weights + attention + 6 * 134_217_728)
    sides = 8192 + 5120 + 2 * (1024 + 5120) + 5120 + 8192 + 3 * (25600 + 5120)
    assert trainable_parameters(MODEL, trial) == 64 * 16 * sides == 134_217_728
    assert flops_per_token(MODEL, replace(trial, method="full")) == MODEL.flops_per_token(4096)


def test_columns_of_candidates_are_those_of_their_configs(tmp_path: Path) -> None:
    numerics = {"method": ["full", "lora"], "lora_rank": [4, 8], "lora_target_modules": ["all-linear", "attention"]}
    search = {"engine": "pytorch", "zero_stage": [0, 3], "micro_batch_size": [1, 2], "numerics": numerics}
    space = sample_space(tmp_path, search=search, baseline=...)
    shape = read_shape(space.model.name, space.model.config)
    found, kinds = Trials.of_candidates(space, shape)
    stated = Trials.of(space.candidates[:], space.workload, shape)
    for name in ("rank", "on_attention", "on_mlp", "quantized"):
        assert np.array_equal(getattr(found, name)[kinds], getattr(stated, name)), name
