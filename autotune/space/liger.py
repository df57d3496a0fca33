"""The rules of `use_liger_kernel`: where Liger's kernels run, and what they do not go with."""

import importlib.util

from autotune.space.attention import DRIVER
from autotune.space.layouts import SPLIT_MODEL_TYPES
from autotune.space.rule import DEGREES, Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


@reads("use_liger_kernel")
def _runs(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if not config.use_liger_kernel:
        return None
    if cluster.device == "cpu":
        return "use_liger_kernel needs a GPU, which Triton's kernels are for"
    if DRIVER.exists() and importlib.util.find_spec("liger_kernel") is None:
        return "use_liger_kernel needs liger-kernel, which is not installed: pip install 'autotune-llm[liger]'"
    return None


@reads("use_liger_kernel")
def _family(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.use_liger_kernel or model.model_type in SPLIT_MODEL_TYPES:
        return None
    known = ", ".join(SPLIT_MODEL_TYPES)
    return f"use_liger_kernel is for models of type {known}, and {model.name} is {model.model_type}"


@reads("use_liger_kernel", "loss", *DEGREES)
def _whole_model(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.use_liger_kernel or not config.has_own_layout:
        return None
    return f"use_liger_kernel is for whole models, with a loss of its own, and does not go with {config.own_layout}"


@reads("use_liger_kernel", "activation_checkpointing", "torch_compile")
def _in_place(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.use_liger_kernel:
        return None
    if config.activation_checkpointing == "selective_ops":
        # liger_kernel/ops/rope.py rotates a projection where it lies, and would rotate the one that was kept again.
        return "use_liger_kernel writes over results of matrix products, which selective_ops keeps; use selective"
    return "use_liger_kernel has not been tried with torch_compile" if config.torch_compile else None


LIGER_RULES: tuple[Rule, ...] = (_runs, _family, _whole_model, _in_place)
