"""The rules of `tiled_mlp`: whose MLPs are computed in pieces, and what that does not go with."""

from autotune.space.layouts import SPLIT_MODEL_TYPES
from autotune.space.rule import Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import ZERO_QUANTIZED, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

_UNTRIED = ("torch_compile", "use_liger_kernel", *ZERO_QUANTIZED)


@reads("tiled_mlp")
def _family(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.tiled_mlp or model.model_type in SPLIT_MODEL_TYPES:
        return None
    known = ", ".join(SPLIT_MODEL_TYPES)
    return f"tiled_mlp is for models of type {known}, and {model.name} is {model.model_type}"


@reads("tiled_mlp", "activation_checkpointing")
def _kept(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.tiled_mlp and config.activation_checkpointing == "selective_ops":
        return "activation_checkpointing selective_ops keeps what tiled_mlp computes in pieces so as not to; use full"
    return None


@reads("tiled_mlp", "fp8", "method", "device_map", "offload", *_UNTRIED)
def _tried(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.tiled_mlp:
        return None
    if config.fp8:
        return "fp8 finds one scale for all that a product reads, and tiled_mlp would find one for each piece"
    for field in _UNTRIED:
        if getattr(config, field):
            return f"tiled_mlp has not been tried with {field} true; use false"
    if config.method == "qlora":
        return "tiled_mlp would make weights from 4 bits for each piece, and has not been tried with method qlora"
    if config.device_map == "auto":
        return "tiled_mlp has not been tried with device_map auto"
    return f"tiled_mlp has not been tried with offload {config.offload}" if config.swaps else None


@reads("tiled_mlp", "engine", "batching")
def _lengths(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    """ZeRO-3 gathers weights for each piece anew, and ranks with few tokens would have fewer pieces than others."""
    if config.tiled_mlp and config.engine == "deepspeed" and config.batching in ("dynamic_padding", "packed"):
        return f"tiled_mlp on engine deepspeed has not been tried with batching {config.batching}; use padded"
    return None


@reads("tiled_mlp", "engine", "activation_checkpointing", "lora_target_modules")
def _adapters(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    """By `tests/engines/test_tiled_mlp.py`: what DeepSpeed's function is not given has no gradient, as weights are not,
    and transformers lets what is given have one where it checkpoints.
    """
    if not config.tiled_mlp or config.engine != "deepspeed" or config.activation_checkpointing != "none":
        return None
    if config.lora_target_modules == "mlp":
        return (
            "tiled_mlp on engine deepspeed gives adapters of lora_target_modules mlp no gradient where nothing before"
            " them trains; use all-linear, or activation_checkpointing full"
        )
    return None


TILED_MLP_RULES: tuple[Rule, ...] = (_family, _kept, _tried, _lengths, _adapters)
