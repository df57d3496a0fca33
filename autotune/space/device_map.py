"""The rules of `device_map`: what layers on the GPUs of one process go with."""

from autotune.space.rule import DEGREES, Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


@reads("device_map", "gpus")
def _one_host(config: TrialConfig, _work: Workload, model: ModelSpec, cluster: ClusterSpec) -> str | None:
    if config.device_map == "none":
        return None
    if cluster.device == "cpu":
        return "device_map auto needs several devices in one process, and to PyTorch a host's CPUs are one"
    if config.gpus == 1:
        return "device_map auto spreads layers over GPUs, and gpus is 1"
    if config.gpus > cluster.gpus_per_node:
        return f"device_map auto is one process, and gpus {config.gpus} are on more than one node"
    if config.gpus > model.num_hidden_layers:
        return f"device_map auto leaves some of {config.gpus} GPUs without one of {model.num_hidden_layers} layers"
    return None


@reads("device_map", "method")
def _frozen(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.device_map == "none" or config.method != "full":
        return None
    return "device_map auto is for methods lora and qlora; what trains whole is sharded, by zero_stage"


@reads("device_map", "engine", "zero_stage", "loss", "data_parallel_replicate_size", *DEGREES)
def _alone(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.device_map == "none":
        return None
    if config.engine != "pytorch":
        return "device_map auto is run by engine pytorch alone"
    if config.zero_stage:
        return f"device_map auto is one process, and zero_stage {config.zero_stage} shards over several; use 0"
    if config.has_own_layout:
        return f"device_map auto does not go with {config.own_layout}"
    if config.data_parallel_replicate_size > 1:
        return f"device_map auto is one process, and has no {config.data_parallel_replicate_size} groups of them"
    return None


@reads("device_map", "optimizer", "torch_compile", "precision", "use_liger_kernel")
def _tried(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.device_map == "none":
        return None
    if config.torch_compile:
        return "torch_compile compiles layers as they are, and device_map auto puts hooks into them"
    if config.use_liger_kernel:
        return "device_map auto has not been tried with use_liger_kernel"
    if config.optimizer != "adamw":
        return f"device_map auto has not been tried with optimizer {config.optimizer}; use adamw"
    if config.precision == "fp16":
        return "device_map auto has not been tried with the loss scale of precision fp16; use bf16"
    return None


DEVICE_MAP_RULES: tuple[Rule, ...] = (_one_host, _frozen, _alone, _tried)
