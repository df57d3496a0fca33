"""The rules of `fp8`: which GPUs multiply in it, and what it has been held against a plain loop with."""

import importlib.util

from autotune.space.attention import DRIVER
from autotune.space.rule import DEGREES, Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

FP8_GPUS = ("H100-80GB", "H200-141GB", "H20-96GB", "B200-180GB", "L40S-48GB", "RTX-4090-24GB")
"""Of compute capability 8.9 and more."""
MULTIPLE = 16
"""Of which `torch._scaled_mm` wants the width of what it sums over; tokens, for the gradient of a weight."""


@reads("fp8")
def _runs(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if not config.fp8:
        return None
    if cluster.device == "cpu":
        return "fp8 needs a GPU, and on CPUs torchao only emulates it"
    if cluster.gpu.name not in FP8_GPUS:
        return f"fp8 needs a GPU of compute capability 8.9 or more, and {cluster.gpu.name} is none"
    if DRIVER.exists() and importlib.util.find_spec("torchao") is None:
        return "fp8 needs torchao, which is not installed: pip install 'autotune-llm[fp8]'"
    return None


@reads("fp8", "engine", "loss", *DEGREES)
def _engine(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.fp8:
        return None
    if config.engine != "pytorch":
        return "fp8 is run by engine pytorch alone"
    return f"fp8 does not go with {config.own_layout}" if config.has_own_layout else None


@reads("fp8", "precision", "method", "use_liger_kernel", "activation_checkpointing")
def _untried(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.fp8:
        return None
    if config.activation_checkpointing == "selective_ops":
        return "fp8 multiplies by other operators than those whose results selective_ops keeps; use selective"
    for field, plain in (("precision", "bf16"), ("method", "full"), ("use_liger_kernel", False)):
        value = getattr(config, field)
        if value != plain:
            return f"fp8 has not been tried with {field} {str(value).lower()}; use {str(plain).lower()}"
    return None


@reads("fp8", "micro_batch_size", "sequence_length", "batching")
def _multiples(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.fp8:
        return None
    if config.batching in ("dynamic_padding", "packed"):
        return (
            f"fp8 multiplies by multiples of {MULTIPLE} tokens, and batching {config.batching} comes to any; use padded"
        )
    tokens = config.micro_batch_size * config.sequence_length
    return (
        f"fp8 multiplies by multiples of {MULTIPLE} tokens, and a micro-batch has {tokens}"
        if tokens % MULTIPLE
        else None
    )


FP8_RULES: tuple[Rule, ...] = (_runs, _engine, _untried, _multiples)
