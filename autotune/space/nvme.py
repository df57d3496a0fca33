"""The rules of `offload: optimizer_nvme` and what begins with it: where DeepSpeed swaps to a disk, and whether one can
hold it all.
"""

from autotune.formats.deepspeed_json import async_io_error
from autotune.space.attention import DRIVER
from autotune.space.rule import Rule, reads
from autotune.spec.adapters import ADAPTED_MODEL_TYPES
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import SECOND_PARTITION, ZERO_QUANTIZED, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.nvme import (
    AHEAD_KEYS,
    BUFFERS,
    BUFFERS_KEY,
    FEWEST_PARAMETER_BUFFERS,
    PARAMETER_BUFFER_KEY,
    PARAMETER_BUFFER_SIZE,
    PARAMETER_BUFFERS,
    PARAMETER_BUFFERS_KEY,
    PIPELINES,
    largest_partition,
    stored_bytes,
)
from autotune.spec.workload import Workload
from autotune.units import format_bytes


@reads("offload", "zero_stage")
def _stage(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.swaps or config.zero_stage == 3:
        return None
    return (
        f"offload {config.offload} needs zero_stage 3: under {config.zero_stage} DeepSpeed keeps the states in main"
        " memory and says nothing"
    )


@reads(
    "offload",
    "method",
    "tensor_parallel_size",
    "sequence_parallel_size",
    *ZERO_QUANTIZED,
    f"deepspeed.{SECOND_PARTITION}",
)
def _tried(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.swaps:
        return None
    if config.method != "full":
        return (
            f"offload {config.offload} is for all weights: what method {config.method} trains is small; use optimizer"
        )
    plain = {"tensor_parallel_size": 1, "sequence_parallel_size": 1, **dict.fromkeys(ZERO_QUANTIZED, False)}
    values = {field: getattr(config, field) for field in plain} | {
        SECOND_PARTITION: dict(config.deepspeed).get(SECOND_PARTITION, 1)
    }
    for field, value in values.items():
        if value != plain.get(field, 1):
            return f"offload {config.offload} has not been tried with {field} {value}; use {plain.get(field, 1)}"
    return None


@reads("offload", *(f"deepspeed.{key}" for key in (BUFFERS_KEY, *PIPELINES)))
def _buffers(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.swaps:
        return None
    keys = dict(config.deepspeed)
    needed, given = BUFFERS * (1 + sum(bool(keys.get(key)) for key in PIPELINES)), keys.get(BUFFERS_KEY, BUFFERS)
    if float(given) >= needed:
        return None
    return f"offload {config.offload} runs out of buffers in an update: {BUFFERS_KEY} is {given}, and it needs {needed}"


@reads("offload", "activation_checkpointing", *(f"deepspeed.{key}" for key in AHEAD_KEYS))
def _parameters_tried(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.swaps_parameters:
        return None
    if model.model_type not in ADAPTED_MODEL_TYPES:
        return (
            f"offload {config.offload} has not been tried with {model.model_type} models; use optimizer_nvme+parameters"
        )
    if config.activation_checkpointing == "selective_ops":
        return f"offload {config.offload} gathers parameters again, where selective_ops fails; use full or selective"
    for key in AHEAD_KEYS:
        if dict(config.deepspeed).get(key, 0) != 0:
            return f"offload {config.offload} runs out of buffers where DeepSpeed reads ahead; leave {key} out"
    return None


@reads("offload", "gpus", *(f"deepspeed.{key}" for key in (PARAMETER_BUFFERS_KEY, PARAMETER_BUFFER_KEY)))
def _parameter_buffers(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.swaps_parameters:
        return None
    keys = dict(config.deepspeed)
    for key, default, needed in (
        (PARAMETER_BUFFERS_KEY, PARAMETER_BUFFERS, FEWEST_PARAMETER_BUFFERS),
        (PARAMETER_BUFFER_KEY, PARAMETER_BUFFER_SIZE, largest_partition(model, config.gpus)),
    ):
        if float(keys.get(key, default)) < needed:
            return (
                f"offload {config.offload} on {config.gpus} GPUs needs {needed} or more as DeepSpeed's {key}, and it is"
                f" {keys.get(key, default)}; set it under search.deepspeed"
            )
    return None


@reads("offload", "gpus", "precision")
def _disk(config: TrialConfig, _work: Workload, model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if not config.swaps:
        return None
    if cluster.nvme is None:
        return f"offload {config.offload} needs a folder on each node's fast disk: state nvme: {{path: /local_nvme}}"
    needed, free = stored_bytes(config, model, cluster.gpus_per_node), cluster.nvme.free_bytes
    if free is not None and needed > free:
        return (
            f"offload {config.offload} on {config.gpus} GPUs writes {format_bytes(needed)} to the disk of a node, which"
            f" has {format_bytes(free)} free"
        )
    return None


@reads("offload")
def _async_io(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if not config.swaps or not (cluster.device == "cpu" or DRIVER.exists()):
        return None  # this machine says nothing about the cluster that the file describes
    reason = async_io_error()
    return None if reason is None else f"offload {config.offload} cannot run: {reason}"


NVME_RULES: tuple[Rule, ...] = (_stage, _tried, _buffers, _parameters_tried, _parameter_buffers, _disk, _async_io)
