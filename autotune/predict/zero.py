"""How ZeRO's limits show in a model that is too shallow for them, and how deep one has to be traced instead.

Buckets, partitions, sub-groups and what is kept gathered are so many elements, whatever the depth.
"""

import math
from dataclasses import replace

from autotune.predict.segments import TRACED_LAYERS
from autotune.spec.adapters import adapted_matrices, trainable_parameters
from autotune.spec.config import GATHERED_LIMITS, MOST_GATHERED, SUB_GROUP_KEY, SUB_GROUP_SIZE, TrialConfig
from autotune.spec.model import ModelSpec

UNCUT = 10**15


def first_depth(model: ModelSpec, config: TrialConfig) -> int:
    """Layers of the first trace: so many that memory grows evenly with each further one."""
    if config.engine != "deepspeed":
        return TRACED_LAYERS
    if config.zero_stage == 3:
        return _released_depth(model, config)
    return _uneven_depth(model, config) if config.zero_stage > 0 else TRACED_LAYERS


def _released_depth(model: ModelSpec, config: TrialConfig) -> int:
    """Layers of the first trace under ZeRO-3, which keeps gathered what it needs again soon.

    It releases a module's parameters unless the next use is within `stage3_max_reuse_distance` elements, and gathers
    ahead until `stage3_max_live_parameters` are there (deepspeed/runtime/zero/partitioned_param_coordinator.py). A
    model that is smaller keeps all its layers, so that a line in depth would carry on what a deeper one releases. Where
    the first three layers are more than those limits, three do; else it was seen to be even from a layer behind limits
    and embedding on (Qwen2.5-7B and 14B, Qwen3-4B, 8B and 14B against traces of all their layers).
    """
    layer = (model.num_parameters - _outside(model)) / model.num_hidden_layers / config.tensor_parallel_size
    keys = dict(config.deepspeed)
    if config.swaps_parameters:  # `autotune.spec.nvme.AHEAD_KEYS`
        return TRACED_LAYERS
    limit = max(float(keys.get(key, MOST_GATHERED)) for key in GATHERED_LIMITS)
    if TRACED_LAYERS * layer > limit:
        return TRACED_LAYERS
    return math.ceil((limit + _embedding_size(model)) / layer) + 1


def _outside(model: ModelSpec, config: TrialConfig | None = None) -> int:
    """Elements that are in no layer; with a config of DeepSpeed, of one rank."""
    embedding = _embedding_size(model, config)
    if model.config.get("tie_word_embeddings"):
        return embedding
    return embedding + _embedding_size(model) // (1 if config is None else config.tensor_parallel_size)


def _uneven_depth(model: ModelSpec, config: TrialConfig) -> int:
    """Layers of the first trace where buckets or partitions end within layers.

    Under stages 1 and 2 of DeepSpeed a rank keeps the gradients of each parameter of which its partition has a piece.
    Where that of the whole model is more than the embedding, so must be that of the traced one.
    """
    if config.method != "full":
        return TRACED_LAYERS  # adapters are all small
    embedding, parameters = _embedding_size(model, config), _trained(model, config)
    least = config.data_parallel_size * embedding
    if parameters < least:
        return TRACED_LAYERS
    outside = _outside(model, config)
    layer = (parameters - outside) / model.num_hidden_layers
    return max(TRACED_LAYERS, math.ceil((1.02 * least - outside) / layer))


def _embedding_size(model: ModelSpec, config: TrialConfig | None = None) -> int:
    """Elements; with a config of DeepSpeed, of one rank.

    AutoTP follows transformers' plan: all matrices are shared but the embedding, and that too where it is the head.
    """
    size = model.vocab_size * int(model.config["hidden_size"])
    shared = config is not None and model.config.get("tie_word_embeddings")
    return size // config.tensor_parallel_size if config is not None and shared else size


def _trained(model: ModelSpec, config: TrialConfig) -> int:
    """Elements of what a rank of DeepSpeed trains, before ZeRO divides it."""
    whole = trainable_parameters(model, config)
    if config.tensor_parallel_size == 1:
        return whole
    embedding = _embedding_size(model)
    return (whole - embedding) // config.tensor_parallel_size + _embedding_size(model, config)


def largest_double_bytes(model: ModelSpec, config: TrialConfig) -> int | None:
    """Bytes of the largest fp64 copy of a gradient, which DeepSpeed makes for the norm.

    It copies one after another what a rank has of each parameter (deepspeed/runtime/zero/stage_1_and_2.py,
    `get_grad_norm_direct`). In a shallow model a partition of stages 1 and 2 can be less than the embedding.
    """
    if config.engine != "deepspeed" or config.zero_stage not in (1, 2):
        return None
    largest = _embedding_size(model, config)
    if config.lora_target_modules is not None and config.lora_rank is not None:
        largest = config.lora_rank * max(map(max, adapted_matrices(model, config.lora_target_modules).values()))
    return 8 * min(largest, _trained(model, config) // config.data_parallel_size)


def all_at_once(model: ModelSpec, config: TrialConfig) -> tuple[TrialConfig, float]:
    """The config with an update that is not cut, and the share (0..1) of the parameters that it works on at a time.

    ZeRO-3 updates `sub_group_size` elements of a rank's partition after another (deepspeed/runtime/zero/stage3.py). A
    shallow model fits in one such group and would say that the whole of a deep one does.
    """
    if config.engine != "deepspeed" or config.zero_stage != 3:
        return config, 1.0
    keys = dict(config.deepspeed)
    size = float(keys.get(SUB_GROUP_KEY, SUB_GROUP_SIZE))
    uncut = replace(config, deepspeed=tuple((keys | {SUB_GROUP_KEY: UNCUT}).items()))
    return uncut, min(1.0, size * config.shards / _trained(model, config))
