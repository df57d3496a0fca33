"""DeepSpeed's own tiled MLP, put into a model as ALST's guide does (deepspeed/runtime/sequence_parallel/ulysses_sp.py).

Its backward pass has one of each piece inside, in which weights get a gradient each time; it tells ZeRO by
`ds_grad_is_ready` to reduce them at the last piece only.
"""

import functools
import math
from collections.abc import Callable

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
from transformers import PreTrainedModel

from autotune.modeling.build import checkpointed_layers
from autotune.spec.config import MLP_TILES, TrialConfig


def apply_deepspeed_tiled_mlp(model: PreTrainedModel, config: TrialConfig) -> None:
    """Have the MLP of each layer compute a piece of the sequence at a time, in place."""
    if not config.tiled_mlp:
        return
    for layer in checkpointed_layers(model):
        layer.mlp.forward = functools.partial(in_tiles, layer.mlp, layer.mlp.forward)


def in_tiles(
    mlp: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """What `forward` of an MLP makes of (batch, sequence, hidden_size), a piece at a time."""
    tokens = hidden.shape[:-1].numel()
    # Of few tokens `torch.chunk` makes fewer pieces than it is asked for, and DeepSpeed, which waits for the last one,
    # would never reduce a gradient.
    tiles = math.ceil(tokens / math.ceil(tokens / MLP_TILES))
    weights = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    tiled: torch.Tensor = TiledMLP.apply(lambda _mlp, piece: forward(piece), mlp, hidden, tiles, weights)
    return tiled
