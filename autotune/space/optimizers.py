"""The rules of `optimizer`: where Adam's states can have 8 bits."""

import importlib.util

from autotune.space.compilation import missing_compiler
from autotune.space.rule import Rule, reads
from autotune.spec.adapters import trainable_parameters
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import SUB_GROUP_KEY, SUB_GROUP_SIZE, Optimizer, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

MOST_VALUES = 2**31 - 1
"""Of a tensor that bitsandbytes updates: it hands their number on in 32 bits (backends/cuda/ops.py)."""

_NEEDED: dict[Optimizer, tuple[str, str]] = {
    "adamw_8bit": ("bitsandbytes", "adamw-8bit"),
    "adamw_torch_8bit": ("torchao", "adamw-torch-8bit"),
}
"""The package that is the optimizer, and our extra that brings it."""


@reads("optimizer")
def _installed(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    package, extra = _NEEDED.get(config.optimizer, (None, None))
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"optimizer {config.optimizer} needs {package}, which is not installed: pip install 'autotune-llm[{extra}]'"


@reads("optimizer")
def _compiled(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    missing = missing_compiler(cluster) if config.optimizer == "adamw_torch_8bit" else None
    return None if missing is None else f"optimizer adamw_torch_8bit compiles its update, which needs {missing}"


@reads("optimizer", "engine")
def _engine(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.optimizer == "adamw_torch_8bit" and config.engine == "deepspeed":
        return "optimizer adamw_torch_8bit has not been tried on engine deepspeed; use adamw_8bit"
    return None


@reads("optimizer", "precision", "method", "torch_compile")
def _untried(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.optimizer != "adamw_torch_8bit":
        return None
    if config.method != "full":
        return f"optimizer adamw_torch_8bit has not been tried with method {config.method}, of few states; use adamw"
    if config.precision == "fp16":
        return "optimizer adamw_torch_8bit has not been tried with the loss scale of precision fp16; use bf16"
    return "optimizer adamw_torch_8bit has not been tried with torch_compile true" if config.torch_compile else None


@reads("optimizer", "engine", "zero_stage", "tensor_parallel_size")
def _whole_tensors(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.optimizer != "adamw_8bit" or config.engine != "pytorch":
        return None
    for field in ("zero_stage", "tensor_parallel_size"):
        value = getattr(config, field)
        if value > (field == "tensor_parallel_size"):
            return (
                f"optimizer adamw_8bit does not know the DTensors that {field} {value} makes on engine pytorch;"
                " use adamw_torch_8bit"
            )
    return None


@reads("optimizer", "offload")
def _on_the_gpu(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.offload == "none":
        return None
    if config.optimizer == "adamw_8bit":
        return f"offload {config.offload} updates by DeepSpeed's Adam of the host, whose states are fp32; use adamw"
    if config.optimizer == "adamw_torch_8bit":
        return f"optimizer adamw_torch_8bit has not been tried with offload {config.offload}; use adamw"
    return None


@reads(
    "optimizer",
    "engine",
    "zero_stage",
    "gpus",
    "method",
    "lora_rank",
    "lora_target_modules",
    f"deepspeed.{SUB_GROUP_KEY}",
)
def _counts_in_32_bits(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.optimizer != "adamw_8bit" or config.engine != "deepspeed" or config.zero_stage == 0:
        return None
    values = trainable_parameters(model, config) / config.gpus
    if config.zero_stage == 3:
        values = min(values, float(dict(config.deepspeed).get(SUB_GROUP_KEY, SUB_GROUP_SIZE)))
    if values <= MOST_VALUES:
        return None
    remedy = f"a smaller {SUB_GROUP_KEY}" if config.zero_stage == 3 else "zero_stage 3 or more GPUs"
    return (
        f"optimizer adamw_8bit updates at most {MOST_VALUES:,} values at a time, and zero_stage {config.zero_stage}"
        f" gives it {values:,.0f}; use {remedy}"
    )


OPTIMIZER_RULES: tuple[Rule, ...] = (
    _installed,
    _compiled,
    _engine,
    _untried,
    _whole_tensors,
    _on_the_gpu,
    _counts_in_32_bits,
)
