"""The rules of ZeRO++'s quantised communication: where DeepSpeed has kernels for it that train right."""

from autotune.space.rule import Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import ZERO_QUANTIZED, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


@reads(*ZERO_QUANTIZED, "engine", "zero_stage", "tensor_parallel_size", "method")
def _zero_3(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    axis = next((axis for axis in ZERO_QUANTIZED if getattr(config, axis)), None)
    if axis is None:
        return None
    if config.engine != "deepspeed" or config.zero_stage != 3:
        return f"{axis} is ZeRO++'s, on engine deepspeed with zero_stage 3"
    if cluster.device == "cpu":
        return f"{axis} needs a GPU, which DeepSpeed's quantizer kernels are for alone"
    for field, plain in (("tensor_parallel_size", 1), ("method", "full")):
        value = getattr(config, field)
        if value != plain:
            return f"{axis} has not been tried with {field} {value}; use {plain}"
    return None


@reads("zero_quantized_gradients", "precision", "gpus")
def _gradients(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if not config.zero_quantized_gradients:
        return None
    if config.precision != "fp16":
        # csrc/quantization/pt_binding.cpp, `ds_swizzle_quant`; nobody casts before (coalesced_collectives.py).
        return (
            f"zero_quantized_gradients reads gradients as fp16 whatever they are (DeepSpeed 0.19.8),"
            f" and those of precision {config.precision} come out wrong"
        )
    if config.gpus <= cluster.gpus_per_node:
        return f"zero_quantized_gradients does nothing inside a node, and gpus {config.gpus} are in one"
    return None


QUANTIZED_ZERO_RULES: tuple[Rule, ...] = (_zero_3, _gradients)
