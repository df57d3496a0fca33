"""Small values that many tests need: a space file's text, configs, outcomes."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from autotune.space.space import Space, load_space
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Failure, FailureKind, GpuHealth, LongRun, Measurement, Phase, RankMeasurement

MIB = 1024**2

SPACE: dict[str, Any] = {
    "study": "sample",
    "model": "qwen3-tiny",
    "cluster": {"nodes": 1, "gpus_per_node": 2, "gpu": "cpu", "memory_bytes": "60MiB"},
    "workload": {"global_batch_size": 16, "sequence_length": 64},
    "search": {
        "engine": ["deepspeed", "pytorch"],
        "precision": ["bf16", "fp32"],
        "zero_stage": [0, 1, 2, 3],
        "activation_checkpointing": ["none", "full"],
        "micro_batch_size": [1, 2, 4, 8],
    },
    "baseline": {"engine": "deepspeed", "precision": "fp32", "zero_stage": 3, "micro_batch_size": 1},
    "budget": {"trials": 6},
    "measure": {"confirm_top": 0},
}


def space_text(**changes: Any) -> str:
    """The sample file with top-level keys replaced; a key set to `...` is left out."""
    document = {key: value for key, value in {**SPACE, **changes}.items() if value is not ...}
    return yaml.safe_dump(document, sort_keys=False)


def sample_space(folder: Path, **changes: Any) -> Space:
    """The sample space, read from a file in `folder`."""
    path = folder / "space.yaml"
    path.write_text(space_text(**changes), encoding="utf-8")
    return load_space(path)


def measurement(
    tokens_per_second_per_gpu: float = 1000.0,
    *,
    used_bytes: int = 40 * MIB,
    device_bytes: int = 60 * MIB,
    retries: int = 0,
) -> Measurement:
    """A plausible measurement of one rank."""
    rank = RankMeasurement(
        rank=0,
        micro_step_seconds=(0.1, 0.1),
        update_step_seconds=(0.2, 0.2),
        losses=(7.0, 6.9, 6.8),
        peak_memory_allocated_bytes=used_bytes,
        peak_memory_reserved_bytes=used_bytes,
        peak_device_used_bytes=used_bytes,
        device_memory_bytes=device_bytes,
        allocator_retries=retries,
        phase_seconds={"start": 0.1, "build": 0.2, "warmup": 0.3, "measure": 0.4},
        environment={"torch": "2.13.0", "device": "test"},
    )
    return Measurement(
        step_time_seconds=1.0,
        tokens_per_second_per_gpu=tokens_per_second_per_gpu,
        model_flops_utilization=None,
        peak_memory_allocated_bytes=used_bytes,
        peak_memory_reserved_bytes=used_bytes,
        peak_device_used_bytes=used_bytes,
        device_memory_bytes=device_bytes,
        allocator_retries=retries,
        phase_seconds=rank.phase_seconds,
        ranks=(rank,),
        elapsed_seconds=2.0,
    )


def confirmed(seconds: Sequence[float], *, used_bytes: int = 40 * MIB, allocated: Sequence[int] = ()) -> Measurement:
    """What a run of so many whole steps might measure at 1000 tokens a step and GPU."""
    mean = statistics.fmean(seconds)
    found = measurement(1000.0 / mean, used_bytes=used_bytes)
    run = LongRun(
        step_seconds=tuple(seconds),
        allocated_bytes=tuple(allocated) or (MIB,) * len(seconds),
        evaluation_seconds=0.1,
        checkpoint_seconds=0.2,
        checkpoint_bytes=MIB,
        checkpoint_skipped=None,
        host="node-1",
        gpu=GpuHealth(
            lowest_clock_mhz=1500, highest_clock_mhz=1980, hottest_celsius=71, throttle_reasons=("sw_power_cap",)
        ),
    )
    (rank,) = found.ranks
    rank = replace(rank, micro_step_seconds=(), update_step_seconds=(), long_run=run)
    return replace(found, step_time_seconds=mean, ranks=(rank,))


def failure(kind: FailureKind = FailureKind.OUT_OF_MEMORY, **fields: Any) -> Failure:
    """A failure in the backward pass of rank 1."""
    return replace(Failure(kind=kind, phase=Phase.BACKWARD, message="it broke", rank=1, elapsed_seconds=1.0), **fields)


def simulate(config: TrialConfig) -> Measurement | Failure:
    """A small world with an optimum: bigger micro-batches are faster until memory runs out."""
    weight = 2.0 if config.precision == "fp32" else 1.0
    activations = config.micro_batch_size * weight * (2.0 if config.activation_checkpointing == "full" else 6.0)
    used = (20.0 / (1 + config.zero_stage) * weight + activations) * MIB
    if used > 40 * MIB:
        return failure(requested_bytes=int(used))
    speed = 100.0 * config.micro_batch_size / weight - 5.0 * config.zero_stage
    speed *= 0.8 if config.activation_checkpointing == "full" else 1.0
    return measurement(speed, used_bytes=int(used))
