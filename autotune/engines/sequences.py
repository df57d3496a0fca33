"""Ulysses sequence parallelism by DeepSpeed (ALST, arXiv:2506.13996), set up and trained as transformers' Trainer does.

accelerate registers DeepSpeed's attention under the kernel's own name and hands its groups to `deepspeed.initialize`
(accelerate/accelerator.py, `_prepare_deepspeed`); its loader gives each rank a piece of a sequence, with the positions
of its tokens and the labels that follow them (`UlyssesSPDataLoaderAdapter`); the Trainer computes the loss.

ALST's tiled MLP is `tiled_mlp`'s. Left out, whose switches no target has: its tiled loss, and checkpoints on the host.
"""

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from accelerate import ParallelismConfig
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

from autotune.modeling.stage import shifted_labels
from autotune.spec.config import TrialConfig


class SharedSequences:
    """Sequences of which neighbours in rank have a piece each.

    It changes transformers' attention of that name for good, and DeepSpeed has one such set of groups in a process.

    Args:
        model: attends by the config's kernel.
        config: with more than one sequence-parallel rank.
        device: of this rank.

    Raises:
        ValueError: DeepSpeed does not share these heads, or not with this kernel.
    """

    def __init__(self, model: PreTrainedModel, config: TrialConfig, device: torch.device) -> None:
        if device.type == "cpu":
            differentiable.all_gather = all_gather  # type: ignore[assignment]  # nobody calls it without a group
        self._ranks = config.sequence_parallel_size
        self._parallelism = ParallelismConfig(sp_size=self._ranks, sp_backend="deepspeed")
        self.groups: ModuleType = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation=config.attention,
            sequence_parallel_size=self._ranks,
            micro_batch_size=config.micro_batch_size,
            seq_length_is_variable=True,
            disable_in_eval=True,
        )
        """For `deepspeed.initialize`, as its `mpu`."""

    def loss(self, model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """The mean loss (scalar) over whole sequences, on each of their ranks.

        Its gradients are larger than those of the mean by the number of ranks, which ZeRO-3 divides by; see
        `autotune.space.layouts`.

        Args:
            model: DeepSpeed's engine.
            input_ids: (micro-batch, sequence), the same on the ranks that share them.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        inputs = {
            "input_ids": self._piece(input_ids),
            "position_ids": self._piece(positions),
            "shift_labels": self._piece(shifted_labels(input_ids)),
            "use_cache": False,
        }
        loss: torch.Tensor = deepspeed_sp_compute_loss(None, model, inputs, False, self._parallelism)
        return loss

    def _piece(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.chunk(self._ranks, dim=1)[dist.get_rank() % self._ranks].contiguous()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        gathered = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(gathered, tensor, group=group)
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = torch.stack(gradients)
        dist.all_reduce(summed, group=ctx.group)
        return summed[dist.get_rank(ctx.group)], None


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
    """What torch's differentiable one does with NCCL.

    With gloo, torch takes the ranks of any group for the first ones of all (torch 2.13, distributed/nn/functional.py,
    `_AlltoAll`): the backward pass fails as soon as there are two groups.
    """
    gathered: tuple[torch.Tensor, ...] = _AllGather.apply(tensor, group)  # type: ignore[no-untyped-call]  # torch has not annotated it
    return gathered
