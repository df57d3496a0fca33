"""The rules of `attention`: where a kernel can run, and whether it is installed."""

import importlib.util
from pathlib import Path

from autotune.space.rule import DEGREES, Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import FLASH_ATTENTION, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

HOPPER = ("H100-80GB", "H200-141GB", "H20-96GB")
"""What FlashAttention-3 is written for (Shah et al., arXiv:2407.08608)."""

PACKAGES = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": ("flash_attn_interface", "install it from the folder hopper of Dao-AILab/flash-attention"),
}
"""The module that transformers imports, and how to come by it. With the package `kernels` transformers loads either
from the hub instead (modeling_flash_attention_utils.py)."""

FLEX_WIDTH = 16
"""Of a head at least, for the products of FlexAttention's kernels (torch 2.13, _inductor/kernel/flex)."""

FLEX_MODEL_TYPES = ("qwen2", "qwen3", "llama")
"""Families whose training with FlexAttention is held against a plain loop by `tests/engines/test_flex.py`."""

DRIVER = Path("/proc/driver/nvidia")
"""Is there where NVIDIA GPUs are: packages of a machine without say nothing about the cluster that a file describes."""


@reads("attention", "precision")
def _flash_attention(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if config.attention not in FLASH_ATTENTION:
        return None
    if cluster.device == "cpu":
        return f"attention {config.attention} needs a GPU"
    if config.precision == "fp32":
        return f"attention {config.attention} has no fp32 kernel"
    if config.attention == "flash_attention_3" and cluster.gpu.name not in HOPPER:
        return f"attention flash_attention_3 is for GPUs like H100, and {cluster.gpu.name} is none"
    return None


@reads("attention")
def _installed(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if config.attention not in FLASH_ATTENTION or cluster.device == "cpu" or not DRIVER.exists():
        return None
    module, remedy = PACKAGES[config.attention]
    if any(importlib.util.find_spec(name) is not None for name in (module, "kernels")):
        return None
    return f"attention {config.attention} needs {module}, which is not installed: {remedy}"


@reads("attention", "precision")
def _flex_runs(config: TrialConfig, _work: Workload, model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if config.attention != "flex_attention":
        return None
    if cluster.device == "cpu":
        return "attention flex_attention needs a GPU: torch has no backward pass of it on CPUs"
    if DRIVER.exists() and importlib.util.find_spec("triton") is None:
        return "attention flex_attention needs triton, which is not installed: it comes with PyTorch's builds for CUDA"
    if config.precision == "fp32":
        return "attention flex_attention has not been tried in precision fp32, for which torch has its smallest blocks"
    if model.head_dim < FLEX_WIDTH:
        return f"attention flex_attention needs head_dim {FLEX_WIDTH} or more, and {model.name} has {model.head_dim}"
    if model.config.get("attention_dropout"):
        return f"attention flex_attention has no dropout, and {model.name} has attention_dropout; use sdpa"
    return None


@reads("attention")
def _flex_family(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.attention != "flex_attention" or model.model_type in FLEX_MODEL_TYPES:
        return None
    known = ", ".join(FLEX_MODEL_TYPES)
    return f"attention flex_attention is for models of type {known}, and {model.name} is {model.model_type}"


@reads("attention", "engine", "loss", *DEGREES)
def _flex_masks(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.attention != "flex_attention" or not config.has_own_layout:
        return None
    if config.engine == "pytorch":  # `DecoderStage`
        return (
            f"attention flex_attention is causal by a mask alone, and {config.own_layout} gives layers none; use sdpa"
        )
    if config.sequence_parallel_size > 1:  # utils/dataclasses.py, DeepSpeedSequenceParallelConfig
        return (
            f"accelerate refuses attention flex_attention with sequence_parallel_size {config.sequence_parallel_size}"
        )
    return f"attention flex_attention has not been tried with {config.own_layout}"


@reads("attention", "activation_checkpointing", "torch_compile", "use_liger_kernel", "device_map", "fp8", "tiled_mlp")
def _flex_alone(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.attention != "flex_attention":
        return None
    if config.activation_checkpointing == "selective_ops":
        # What is compiled is no operator that could be kept.
        return "activation_checkpointing selective_ops would compute flex_attention again; use full or selective"
    untried = {
        "torch_compile": False,
        "use_liger_kernel": False,
        "device_map": "none",
        "fp8": False,
        "tiled_mlp": False,
    }
    for field, plain in untried.items():
        value = getattr(config, field)
        if value != plain:
            return f"attention flex_attention has not been tried with {field} {str(value).lower()}"
    return None


@reads("attention", "batching")
def _flex_shapes(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    """torch._dynamo.config.recompile_limit is 8: lengths, rows of a last batch and evaluations came to more."""
    if config.attention == "flex_attention" and config.batching == "dynamic_padding":
        return (
            "batching dynamic_padding comes to more shapes than the 8 that torch compiles flex_attention for, and then"
            " it makes every score; use packed or padded"
        )
    return None


ATTENTION_RULES: tuple[Rule, ...] = (
    _flash_attention,
    _installed,
    _flex_runs,
    _flex_family,
    _flex_masks,
    _flex_alone,
    _flex_shapes,
)
