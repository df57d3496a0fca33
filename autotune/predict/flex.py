"""What stands for torch's FlexAttention where a step is traced: on CPUs it has no backward pass, and there is no data
from which to make a block mask.

Read in torch 2.13, _higher_order_ops/flex_attention.py and _inductor/kernel/flex, and in transformers 5.23,
integrations/flex_attention.py. Held against the graphs that torch makes of it by `tests/predict/test_flex.py`; not
measured on a GPU.

Left out: the block mask's indexes, 16 bytes for each pair of blocks of 128 positions and for each row (16 MiB for
131,072 tokens), and the logarithms that transformers is handed too, 6 bytes a position and head of one layer at a time.
"""

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask


class _FlexAttention(torch.autograd.Function):
    """Saves its inputs and result, and an fp32 logarithm for each position and head.

    Of (batch, heads, positions, width) tensors, where keys and values may have fewer heads.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        logarithms = query.new_empty(query.shape[:3], dtype=torch.float32)
        _ = torch.empty_like(logarithms)  # the highest scores, which nobody asks for
        ctx.save_for_backward(query, key, value, output, logarithms)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, logarithms = ctx.saved_tensors
        # Of the logarithms, which nobody uses: zeros. They are taken from the sums of output times gradient.
        of_logarithms = torch.empty_like(logarithms)
        _ = torch.empty_like(of_logarithms), torch.empty_like(logarithms)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> Any:
    """Stands for transformers' `compile_friendly_flex_attention`, without the logarithms, as it is called on CPUs."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    return _FlexAttention.apply(query, key, value)  # type: ignore[no-untyped-call]  # torch has not annotated it


def block_mask(mask_mod: Any, B: int, H: int | None, Q_LEN: int, KV_LEN: int, **_: Any) -> BlockMask:  # noqa: N803  # torch's names
    """Stands for torch's `create_block_mask`: keeps what the mask is made from, and has no indexes."""
    nothing = torch.empty(B, 1, 0, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        nothing, nothing[..., None], mask_mod=mask_mod, seq_lengths=(Q_LEN, KV_LEN), compute_q_blocks=False
    )
