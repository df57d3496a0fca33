"""The rules of `method`: what LoRA and QLoRA need, and what they do not go with."""

import importlib.util

from autotune.space.file import SpaceFile
from autotune.space.rule import Rule, reads
from autotune.spec.adapters import ADAPTED_MODEL_TYPES, adapted_matrices
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_target_modules")
"""Fields of a config that has adapters."""


def contradiction(file: SpaceFile) -> str | None:
    """What a file states twice, or for no one, as `key: what; remedy`; None where it is consistent."""
    numerics = file.search.numerics
    if numerics.method is not None and "method" in file.model_fields_set:
        return "method: is stated here and under search.numerics; keep one of them"
    for key, axis in (("rank", numerics.lora_rank), ("target_modules", numerics.lora_target_modules)):
        if axis is not None and key in file.lora.model_fields_set:
            return f"lora.{key}: is stated here and as search.numerics.lora_{key}; keep one of them"
    stated = sorted(f"lora.{key}" for key in file.lora.model_fields_set)
    stated += sorted(f"search.numerics.{key}" for key in numerics.model_fields_set & set(LORA_FIELDS))
    if stated and set(numerics.method or [file.method]) == {"full"}:
        return f"{stated[0]}: means nothing to method full; take it out, or set method to lora or qlora"
    return None


@reads("method")
def _installed(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return "method qlora needs bitsandbytes, which is not installed: pip install 'autotune-llm[qlora]'"
    return None


@reads("method")
def _family(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.method == "full" or model.model_type in ADAPTED_MODEL_TYPES:
        return None
    known = ", ".join(ADAPTED_MODEL_TYPES)
    return f"method {config.method} is for models of type {known}, and {model.name} is {model.model_type}"


@reads("method", "lora_rank", "lora_target_modules")
def _rank(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.lora_target_modules is None or config.lora_rank is None or model.model_type not in ADAPTED_MODEL_TYPES:
        return None
    matrices = adapted_matrices(model, config.lora_target_modules)
    name, shape = min(matrices.items(), key=lambda item: min(item[1]))
    if config.lora_rank > min(shape):
        return f"lora_rank {config.lora_rank} is more than that of {name}, {shape[0]} x {shape[1]} in {model.name}"
    return None


@reads("method", "lora_rank", "tensor_parallel_size")
def _split(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.lora_rank is not None and config.lora_rank % config.tensor_parallel_size:
        return f"tensor_parallel_size {config.tensor_parallel_size} does not divide lora_rank {config.lora_rank}"
    return None


@reads("method", "engine", "zero_stage", "tensor_parallel_size")
def _packed(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.method != "qlora":
        return None
    if config.zero_stage == 3 or (config.engine == "pytorch" and config.zero_stage):
        return f"zero_stage {config.zero_stage} on engine {config.engine} shards weights, and those of qlora stay whole"
    if config.tensor_parallel_size > 1:
        return f"tensor_parallel_size {config.tensor_parallel_size} shares matrices, and those of qlora stay whole"
    return None


METHOD_RULES: tuple[Rule, ...] = (_installed, _family, _rank, _split, _packed)
