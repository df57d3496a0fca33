"""The rules of `attention`: where a kernel can run, and whether it is installed."""

import importlib.util
from pathlib import Path

from autotune.space.rule import Rule, reads
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


ATTENTION_RULES: tuple[Rule, ...] = (_flash_attention, _installed)
