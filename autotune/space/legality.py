"""The rules that refuse a config before any process starts. Each names the values that clash and why."""

from autotune.formats.targets import READ_BY_TARGETS, Target, no_target
from autotune.space.attention import ATTENTION_RULES
from autotune.space.compilation import COMPILATION_RULES
from autotune.space.device_map import DEVICE_MAP_RULES
from autotune.space.fp8 import FP8_RULES
from autotune.space.layouts import LAYOUT_RULES
from autotune.space.lengths import LENGTH_RULES
from autotune.space.liger import LIGER_RULES
from autotune.space.methods import LORA_FIELDS, METHOD_RULES
from autotune.space.nvme import NVME_RULES
from autotune.space.optimizers import OPTIMIZER_RULES
from autotune.space.quantized_zero import QUANTIZED_ZERO_RULES
from autotune.space.rule import DEGREES, Rule, reads
from autotune.space.tiled_mlp import TILED_MLP_RULES
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import GATHERED_LIMITS, MOST_GATHERED, SECOND_PARTITION, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


def rules(targets: tuple[Target, ...]) -> tuple[Rule, ...]:
    """Every rule of a study, in the order in which they speak: the config can run, and a target can run it later."""
    expressed = Rule((*READ_BY_TARGETS, *DEGREES), lambda config, *_: no_target(targets, config))
    return (
        *RULES,
        *LAYOUT_RULES,
        *METHOD_RULES,
        *OPTIMIZER_RULES,
        *NVME_RULES,
        *QUANTIZED_ZERO_RULES,
        *COMPILATION_RULES,
        *LIGER_RULES,
        *FP8_RULES,
        *TILED_MLP_RULES,
        expressed,
    )


AXES_OF_CONDITIONS = (
    "engine",
    "zero_stage",
    "activation_checkpointing",
    "pipeline_parallel_size",
    "method",
    "optimizer",
)
"""What `applies` reads of a config."""


def applies(axis: str, config: TrialConfig) -> bool:
    """Whether an axis changes anything under this config.

    One that does not is left out, so that two configs which run the same are one candidate.
    """
    if axis == "selective_every":
        return config.activation_checkpointing == "selective"
    if axis == "pipeline_schedule":
        return config.pipeline_parallel_size > 1
    if axis in LORA_FIELDS:
        return config.method != "full"
    group, _, key = axis.partition(".")
    return _deepspeed_key_applies(key, config) if group == "deepspeed" else True


def _deepspeed_key_applies(key: str, config: TrialConfig) -> bool:
    """ZeRO keys need ZeRO; stage 3 alone reads `stage3_*` and `sub_group_size` (deepspeed/runtime/zero/config.py)."""
    if config.engine != "deepspeed":
        return False
    group, _, name = key.partition(".")
    if group == "optimizer" or key == "zero_allow_untested_optimizer":
        return config.optimizer == "adamw"  # DeepSpeed's own; of another it must allow
    if group != "zero_optimization":
        return True
    if name.startswith("stage3_") or name in ("sub_group_size", "zero_hpz_partition_size"):
        return config.zero_stage == 3
    return config.zero_stage >= 1


@reads("micro_batch_size", "gpus", "device_map", *DEGREES)
def _batch_divides(config: TrialConfig, workload: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    try:
        workload.gradient_accumulation_steps(config)
    except ValueError as error:
        return str(error)
    return None


@reads("gpus")
def _fits_the_cluster(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    per_node = cluster.gpus_per_node
    if config.gpus > cluster.total_gpus:
        return f"gpus {config.gpus} is more than the cluster's {cluster.total_gpus}"
    if config.gpus > per_node and config.gpus % per_node:
        return f"gpus {config.gpus} is no whole number of nodes with {per_node} GPUs"
    return None


@reads("sequence_length")
def _sequence_fits(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    limit = model.max_position_embeddings
    if config.sequence_length > limit:
        return f"sequence_length {config.sequence_length} is more than the {limit} positions of {model.name}"
    return None


@reads("engine", "zero_stage")
def _pytorch_stage(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.engine == "pytorch" and config.zero_stage == 1:
        return "zero_stage 1 does not exist on engine pytorch, which shards by FSDP2 (2 and 3) or not at all (0)"
    return None


@reads("offload", "engine", "zero_stage")
def _offload(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.offload == "none":
        return None
    if config.zero_stage == 0:
        return f"offload {config.offload} needs ZeRO, and zero_stage is 0"
    if config.engine == "pytorch":
        if config.offload != "optimizer+parameters":
            return f"offload {config.offload} is run by engine deepspeed alone; FSDP2 takes optimizer+parameters"
        return None
    if config.offload == "optimizer+parameters" and config.zero_stage != 3:
        return f"offload of parameters needs zero_stage 3, and zero_stage is {config.zero_stage}"
    return None


@reads("engine", "zero_stage", "gpus", f"deepspeed.{SECOND_PARTITION}")
def _second_partition(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    ranks = dict(config.deepspeed).get(SECOND_PARTITION, 1)
    if not isinstance(ranks, int) or ranks <= 1 or config.gpus % min(ranks, config.gpus) == 0:
        return None  # of more ranks than there are, DeepSpeed takes all
    return f"{SECOND_PARTITION} {ranks} does not divide gpus {config.gpus}"


@reads("activation_checkpointing", "selective_every")
def _selective(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.activation_checkpointing != "selective":
        return None
    every, layers = config.selective_every, model.num_hidden_layers
    if every is None or every > layers:
        return f"selective_every {every} leaves no layer of {layers} to checkpoint"
    return None


@reads("activation_checkpointing", "engine", "zero_stage", *(f"deepspeed.{key}" for key in GATHERED_LIMITS))
def _selective_ops(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    """Operators that come only when a layer runs again, which torch refuses (torch/utils/checkpoint.py).

    ZeRO-3 has them where it gives up and gathers again what a layer needs. Small models failed at most limits below 0.4
    of their parameters and at none from 0.5 on (0.19.8); the bound is twice that.
    """
    if config.activation_checkpointing != "selective_ops" or (config.engine, config.zero_stage) != ("deepspeed", 3):
        return None
    keys = dict(config.deepspeed)
    kept = min(int(keys.get(key, MOST_GATHERED)) for key in GATHERED_LIMITS)
    if model.num_parameters <= kept:
        return None
    return (
        f"activation_checkpointing selective_ops fails under zero_stage 3 of engine deepspeed where it gathers"
        f" parameters again: {model.name} has {model.num_parameters} and keeps {kept}; use full or selective"
    )


@reads("precision", "engine")
def _fp16_on_cpu(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if config.precision == "fp16" and cluster.device == "cpu" and config.engine == "deepspeed":
        return "precision fp16 on engine deepspeed needs a GPU (DeepSpeed refuses fp16 on CPU)"
    return None


@reads("precision", "offload", "engine")
def _fp16_on_host(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.precision == "fp16" and config.offload != "none" and config.engine == "pytorch":
        return (
            "precision fp16 on engine pytorch unscales gradients on the GPU, and offload has them on the host; use bf16"
        )
    return None


RULES: tuple[Rule, ...] = (
    _batch_divides,
    _fits_the_cluster,
    _sequence_fits,
    _pytorch_stage,
    _offload,
    _second_partition,
    _selective_ops,
    _selective,
    _fp16_on_cpu,
    _fp16_on_host,
    *DEVICE_MAP_RULES,
    *ATTENTION_RULES,
    *LENGTH_RULES,
)
