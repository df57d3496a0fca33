"""The rules that refuse a config before any process starts. Each names the values that clash and why."""

from collections.abc import Callable

from autotune.formats.targets import Target, no_target
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

Rule = Callable[[TrialConfig, Workload, ModelSpec, ClusterSpec], str | None]


def refusal(
    config: TrialConfig, workload: Workload, model: ModelSpec, cluster: ClusterSpec, targets: tuple[Target, ...]
) -> str | None:
    """Why the config is illegal, or None when it is legal: it can run, and one of `targets` can run it afterwards."""
    for rule in RULES:
        reason = rule(config, workload, model, cluster)
        if reason is not None:
            return reason
    return no_target(targets, config)


def deepspeed_key_applies(key: str, config: TrialConfig) -> bool:
    """Whether a DeepSpeed key changes anything under this config.

    A key that does not apply is left out, so that two configs which run the same are one candidate. ZeRO keys need
    ZeRO; `stage3_*` and `sub_group_size` are read by stage 3 alone (deepspeed/runtime/zero/config.py).
    """
    if config.engine != "deepspeed":
        return False
    group, _, name = key.partition(".")
    if group != "zero_optimization":
        return True
    if name.startswith("stage3_") or name == "sub_group_size":
        return config.zero_stage == 3
    return config.zero_stage >= 1


def _batch_divides(config: TrialConfig, workload: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    try:
        workload.gradient_accumulation_steps(config)
    except ValueError as error:
        return str(error)
    return None


def _fits_the_cluster(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    per_node = cluster.gpus_per_node
    if config.gpus > cluster.total_gpus:
        return f"gpus {config.gpus} is more than the cluster's {cluster.total_gpus}"
    if config.gpus > per_node and config.gpus % per_node:
        return f"gpus {config.gpus} is no whole number of nodes with {per_node} GPUs"
    return None


def _sequence_fits(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    limit = model.max_position_embeddings
    if config.sequence_length > limit:
        return f"sequence_length {config.sequence_length} is more than the {limit} positions of {model.name}"
    return None


def _pytorch_stage(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.engine == "pytorch" and config.zero_stage == 1:
        return "zero_stage 1 does not exist on engine pytorch, which shards by FSDP2 (2 and 3) or not at all (0)"
    return None


def _offload(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.offload == "none":
        return None
    if config.engine != "deepspeed":
        return f"offload {config.offload} is run by engine deepspeed alone"
    if config.zero_stage == 0:
        return f"offload {config.offload} needs ZeRO, and zero_stage is 0"
    if config.offload == "optimizer+parameters" and config.zero_stage != 3:
        return f"offload of parameters needs zero_stage 3, and zero_stage is {config.zero_stage}"
    return None


def _selective(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.activation_checkpointing != "selective":
        return None
    every, layers = config.selective_every, model.num_hidden_layers
    if every is None or every > layers:
        return f"selective_every {every} leaves no layer of {layers} to checkpoint"
    return None


def _fp16_on_cpu(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if config.precision == "fp16" and cluster.device == "cpu" and config.engine == "deepspeed":
        return "precision fp16 on engine deepspeed needs a GPU (DeepSpeed refuses fp16 on CPU)"
    return None


def _flash_attention(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if config.attention != "flash_attention_2":
        return None
    if cluster.device == "cpu":
        return "attention flash_attention_2 needs a GPU"
    if config.precision == "fp32":
        return "attention flash_attention_2 has no fp32 kernel"
    return None


RULES: tuple[Rule, ...] = (
    _batch_divides,
    _fits_the_cluster,
    _sequence_fits,
    _pytorch_stage,
    _offload,
    _selective,
    _fp16_on_cpu,
    _flash_attention,
)
