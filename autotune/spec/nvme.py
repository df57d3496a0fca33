"""How much DeepSpeed 0.19 swaps to a disk and through which buffers, for `offload: optimizer_nvme` and what begins with
it (ZeRO-Infinity, Rajbhandari et al., arXiv:2104.07857).

A rank's partition is cut into sub-groups. The fp32 master weights and Adam's two states of each are files, and so are
the fp32 gradients of every parameter of which the rank has 1 MiB or more. An update reads a sub-group into pinned
buffers, works there, and writes the states back. Source: deepspeed/runtime/zero/stage3.py and runtime/swap_tensor
(0.19.8). Smaller sub-groups and gradients stay in memory, which is left out here: models of billions have few.

With `+parameters_nvme` so are a rank's partitions, in the compute dtype, of all parameters of which it has 1 MiB or
more. What is to be gathered is read into a pool of buffers that are as large as the largest; updated sub-groups go back
through a buffer for which DeepSpeed counts all ranks' elements (`stage3.py`,
`_create_fp16_partitions_with_defragmentation`).
"""

from autotune.spec.adapters import trainable_parameters
from autotune.spec.config import SUB_GROUP_KEY, SUB_GROUP_SIZE, TrialConfig
from autotune.spec.model import ModelSpec

STORED_BYTES = 16
"""A parameter, at most: master weight, both states, gradient."""
MOVED_BYTES = 32
"""A parameter and step, at most: the gradient is written; all four are read; the three others are written."""
BUFFERS = 4
"""DeepSpeed's own, runtime/zero/offload_config.py: one for each of the four."""
BUFFERS_KEY = "zero_optimization.offload_optimizer.buffer_count"
PIPELINES = tuple(f"zero_optimization.offload_optimizer.pipeline_{way}" for way in ("read", "write"))
"""Keys that have the sub-group before written, or the next one read, meanwhile: each takes `BUFFERS` more."""
PARAMETER_BUFFERS = 5
"""DeepSpeed's own, runtime/zero/offload_config.py, as is the next."""
FEWEST_PARAMETER_BUFFERS = 4
"""transformers initialises an attention's four matrices together, before the first step."""
PARAMETER_BUFFER_SIZE = 10**8
"""Elements."""
PARAMETER_BUFFERS_KEY = "zero_optimization.offload_param.buffer_count"
PARAMETER_BUFFER_KEY = "zero_optimization.offload_param.buffer_size"
AHEAD_KEYS = ("zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_max_reuse_distance")
"""What DeepSpeed reads ahead, or keeps for later, while parameters are on a disk: nothing. Else a module can find all
buffers taken by others, and the trial fails; whether it does depends on model, limits and number of buffers, and a pool
of 24 failed where 12 were enough."""


def stored_bytes(config: TrialConfig, model: ModelSpec, gpus_per_node: int) -> int:
    """What one node's ranks have on its disk, at most."""
    ranks = min(config.gpus, gpus_per_node)
    swapped = STORED_BYTES * trainable_parameters(model, config)
    if config.swaps_parameters:
        # A head is written before it is tied to the embedding, and its file stays.
        tied = model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0
        swapped += parameter_bytes(config) * (model.num_parameters + tied)
    return swapped * ranks // config.gpus


def swapping_bytes(config: TrialConfig, model: ModelSpec) -> int:
    """What one rank keeps in main memory: pinned buffers, the gradients that it adds up, parameters that are there."""
    gathered = trainable_parameters(model, config)
    if config.offloads_parameters and not config.swaps_parameters:
        gathered += model.num_parameters
    return pinned_bytes(config, model) + parameter_bytes(config) * gathered // config.gpus


def pinned_bytes(config: TrialConfig, model: ModelSpec) -> int:
    """The pinned buffers of one rank."""
    keys = dict(config.deepspeed)
    share = trainable_parameters(model, config) / config.gpus
    largest = min(share, float(keys.get(SUB_GROUP_KEY, SUB_GROUP_SIZE)))
    states = int(4 * largest * float(keys.get(BUFFERS_KEY, BUFFERS)))
    if not config.swaps_parameters:
        return states
    count = float(keys.get(PARAMETER_BUFFERS_KEY, PARAMETER_BUFFERS))
    size = float(keys.get(PARAMETER_BUFFER_KEY, PARAMETER_BUFFER_SIZE))
    return states + int(parameter_bytes(config) * (count * size + largest * config.gpus))


def parameter_bytes(config: TrialConfig) -> int:
    """Of one in the compute dtype."""
    return 4 if config.precision == "fp32" else 2


def largest_partition(model: ModelSpec, gpus: int) -> int:
    """Elements that a rank has of the largest parameter: the embedding, as a rule, or a matrix of a layer."""
    rows = max(model.vocab_size, model.intermediate_size, model.num_attention_heads * model.head_dim)
    return -(-rows * model.hidden_size // gpus)
