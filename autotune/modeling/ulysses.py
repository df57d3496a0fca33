"""Ulysses sequence parallelism: each rank has a piece of the sequence, and inside attention a share of the heads.

Everything but attention works on tokens one by one, so a rank does it for its own piece. Around attention two
all-to-alls exchange pieces of the sequence for heads and back: attention sees whole sequences and needs no other kernel
(Jacobs et al., arXiv:2309.14509). It is registered with transformers as an attention implementation of its own.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autotune.modeling.build import checkpointed_layers
from autotune.spec.config import Attention

_NAME = "autotune_ulysses"


def split_sequence(model: PreTrainedModel, attention: Attention, group: dist.ProcessGroup) -> None:
    """Have `model` attend over sequences of which each rank of `group` holds a piece, in the order of the ranks.

    Args:
        model: its heads per rank are a multiple of the group's size, see `autotune.space.legality`.
        attention: the kernel in between; one that groups the heads by their numbers alone, `sdpa` or flash attention.
        group: the sequence-parallel ranks.
    """
    for layer in checkpointed_layers(model):
        layer.self_attn.sequence_group = group
        layer.self_attn.inner_attention = attention
    model.config._attn_implementation = _NAME


def _ulysses(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention of (batch, heads, tokens of this rank, width) tensors; returns (batch, tokens, heads, width).

    Where there are fewer key heads than ranks, each is sent to all the ranks whose queries need it.
    """
    group: dist.ProcessGroup = module.sequence_group
    ranks = group.size()
    copies = ranks // math.gcd(key.shape[1], ranks)
    if copies > 1:
        key, value = (heads.repeat_interleave(copies, dim=1) for heads in (key, value))
    query, key, value = (_heads_for_tokens(heads, group) for heads in (query, key, value))
    attend = ALL_ATTENTION_FUNCTIONS[module.inner_attention]
    # Flash attention looks there for the library that it is to call.
    module.config._attn_implementation = module.inner_attention
    try:
        output, _ = attend(module, query, key, value, mask, **kwargs)
    finally:
        module.config._attn_implementation = _NAME
    return _tokens_for_heads(output, group), None


def _heads_for_tokens(heads: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(batch, heads, tokens / ranks, width) -> (batch, heads / ranks, tokens, width)."""
    batch, count, tokens, width = heads.shape
    ranks = group.size()
    shares = heads.view(batch, ranks, count // ranks, tokens, width).transpose(0, 1)
    pieces: torch.Tensor = _AllToAll.apply(shares, group)  # type: ignore[no-untyped-call]
    # from (ranks, batch, heads / ranks, tokens / ranks, width)
    return pieces.permute(1, 2, 0, 3, 4).reshape(batch, count // ranks, ranks * tokens, width)


def _tokens_for_heads(output: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(batch, tokens, heads / ranks, width) -> (batch, tokens / ranks, heads, width)."""
    batch, tokens, count, width = output.shape
    ranks = group.size()
    pieces = output.view(batch, ranks, tokens // ranks, count, width).transpose(0, 1)
    shares: torch.Tensor = _AllToAll.apply(pieces, group)  # type: ignore[no-untyped-call]
    # from (ranks, batch, tokens / ranks, heads / ranks, width)
    return shares.permute(1, 2, 0, 3, 4).reshape(batch, tokens // ranks, ranks * count, width)


class _AllToAll(torch.autograd.Function):
    """The i-th part of the first dimension goes to rank i. Sending the gradients the same way sends them back."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(gradient, ctx.group), None


def _all_to_all(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


AttentionInterface.register(_NAME, _ulysses)
