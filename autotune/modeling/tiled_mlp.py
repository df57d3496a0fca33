"""ALST's tiled MLP (Bekman et al., arXiv:2506.13996): a layer's MLP for a piece of the sequence at a time.

What it makes between its matrices is `intermediate_size` wide, for one piece instead of the whole, and none of it is
kept for the backward pass, which computes each piece again before it goes back through it.

By torch's checkpointing, and not, as ALST's, by a function with a backward pass inside its own: a weight's gradients
from all pieces are summed before any hook of DDP or FSDP2 sees them.
"""

from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from autotune.modeling.build import checkpointed_layers
from autotune.spec.config import MLP_TILES, TrialConfig

_SEQUENCE = 1
"""Dimension of the residual stream (batch, sequence, hidden)."""

_Forward = Callable[[torch.Tensor], torch.Tensor]


class Tile(torch.nn.Module):
    """What an MLP does with a piece: a module, so that tensor parallelism can gather pieces as they come.

    The parameters stay those of the MLP, under transformers' names.
    """

    def __init__(self, forward: _Forward) -> None:
        super().__init__()
        self._forward = forward

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, piece, hidden_size), in and out."""
        return self._forward(hidden)


def apply_tiled_mlp(model: PreTrainedModel, config: TrialConfig) -> None:
    """Have the MLP of each layer compute a piece of the sequence at a time, in place.

    Behind `apply_method`, which puts adapters into the MLPs.
    """
    if not config.tiled_mlp:
        return
    for layer in checkpointed_layers(model):
        layer.mlp.tile = Tile(layer.mlp.forward)
        layer.mlp.forward = _in_tiles(layer.mlp.tile)


def _in_tiles(tile: Tile) -> _Forward:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        # Of what tensor-parallel ranks share each cuts its own part: what is gathered of it is then a piece.
        local = hidden.to_local() if isinstance(hidden, DTensor) else hidden
        pieces = local.chunk(MLP_TILES, dim=_SEQUENCE)
        return torch.cat([checkpoint(tile, piece, use_reentrant=False) for piece in pieces], dim=_SEQUENCE)

    return forward
