"""The optimizer that the Hugging Face Trainer makes for the same settings, on the parameters that train."""

from collections.abc import Iterable

import torch

from autotune.spec.config import TrialConfig
from autotune.spec.workload import Workload


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrialConfig, workload: Workload
) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or one with states of 8 bits (Dettmers et al., arXiv:2110.02861), by bitsandbytes or
    torchao.

    Each 256 values of such a state share a scale. Tensors of fewer than 4,096 values keep states in fp32; torchao asks
    this of what a rank has of a tensor, which must be blocks of 256 besides.
    """
    groups = _parameter_groups(list(parameters), workload.weight_decay)
    if config.optimizer == "adamw_8bit":
        import bitsandbytes  # an extra, and seconds to import

        quantised: torch.optim.Optimizer = bitsandbytes.optim.AdamW(groups, lr=workload.learning_rate, optim_bits=8)
        return quantised
    if config.optimizer == "adamw_torch_8bit":
        from torchao.optim import AdamW8bit  # asks for GPUs, which only a rank may

        compiled: torch.optim.Optimizer = AdamW8bit(groups, lr=workload.learning_rate)
        return compiled
    return torch.optim.AdamW(groups, lr=workload.learning_rate, fused=True)


def _parameter_groups(parameters: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """As the Trainer makes them: matrices decay, norms and biases do not."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups: list[dict[str, object]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
