"""How much DeepSpeed 0.19 swaps to a disk and through which buffers, for `offload: optimizer_nvme` (ZeRO-Infinity,
Rajbhandari et al., arXiv:2104.07857).

A rank's partition is cut into sub-groups. The fp32 master weights and Adam's two states of each are files, and so are
the fp32 gradients of every parameter of which the rank has 1 MiB or more. An update reads a sub-group into pinned
buffers, works there, and writes the states back. Source: deepspeed/runtime/zero/stage3.py and runtime/swap_tensor
(0.19.8). Smaller sub-groups and gradients stay in memory, which is left out here: models of billions have few.
"""

from autotune.spec.adapters import trainable_parameters
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec

STORED_BYTES = 16
"""A parameter, at most: master weight, both states, gradient."""
MOVED_BYTES = 32
"""A parameter and step, at most: the gradient is written; all four are read; the three others are written."""
SUB_GROUP_SIZE = 10**9
"""Elements; DeepSpeed's own, runtime/zero/config.py."""
SUB_GROUP_KEY = "zero_optimization.sub_group_size"
BUFFERS = 4
"""DeepSpeed's own, runtime/zero/offload_config.py: one for each of the four."""
BUFFERS_KEY = "zero_optimization.offload_optimizer.buffer_count"
PIPELINES = tuple(f"zero_optimization.offload_optimizer.pipeline_{way}" for way in ("read", "write"))
"""Keys that have the sub-group before written, or the next one read, meanwhile: each takes `BUFFERS` more."""


def stored_bytes(config: TrialConfig, model: ModelSpec, gpus_per_node: int) -> int:
    """What one node's ranks have on its disk, at most."""
    ranks = min(config.gpus, gpus_per_node)
    return STORED_BYTES * trainable_parameters(model, config) * ranks // config.gpus


def swapping_bytes(config: TrialConfig, model: ModelSpec) -> int:
    """What one rank keeps in main memory: pinned buffers, and the gradients that it adds up."""
    value = 4 if config.precision == "fp32" else 2
    return pinned_bytes(config, model) + value * trainable_parameters(model, config) // config.gpus


def pinned_bytes(config: TrialConfig, model: ModelSpec) -> int:
    """The pinned buffers of one rank."""
    keys = dict(config.deepspeed)
    share = trainable_parameters(model, config) / config.gpus
    largest = min(share, float(keys.get(SUB_GROUP_KEY, SUB_GROUP_SIZE)))
    return int(4 * largest * float(keys.get(BUFFERS_KEY, BUFFERS)))
