"""What a layer takes longer whose MLP computes a piece of the sequence at a time, and each again to go back through it.

    pieces           all passes of the MLP for n / `MLP_TILES` tokens, as often, less those for n: each piece reads the
                     weights, and more kernels have more gaps before them
    recomputation    its forward pass in pieces once more, adapters included
    sums             bytes of adding up the gradients of its weights, 3 values each for all pieces but the first

Left out: joining the pieces, 4·n·h bytes; that torch's checkpointing stops before the last product.
"""

from dataclasses import dataclass, replace

import numpy as np

from autotune.predict.adapters import AdapterWork
from autotune.predict.kernels import Values
from autotune.predict.roofline import LayerWork, total
from autotune.predict.step import HOOKED_PASSES, OPERATOR_SECONDS
from autotune.spec.config import MLP_TILES

OPERATORS = (5, 10)
"""Of an MLP, forward and backward: 3 and 6 products, and `MLP_KERNELS`."""
SHARE_OF_MODULES = 4 / 14
"""Of a Qwen3 layer's modules, those that a piece calls: three matrices and the activation."""


@dataclass(frozen=True, slots=True)
class TiledMlpWork:
    """The MLPs of the layers of one model on one micro-batch, in columns."""

    work: LayerWork
    """Of the layers that they are in."""
    adapters: AdapterWork

    def seconds(self, forward_passes: Values) -> Values:
        """What a layer takes longer in both passes, of which the forward one is run so many times."""
        piece = replace(self.work, tokens=self.work.tokens / MLP_TILES)
        forward, backward = (MLP_TILES * piece.mlp(backward=backward) for backward in (False, True))
        longer = forward_passes * (forward - self.work.mlp(backward=False))
        longer = longer + backward - self.work.mlp(backward=True)
        beside = replace(self.adapters, on_attention=np.zeros_like(self.adapters.on_attention))
        return longer + forward + total(beside.layer(backward=False)) + self._sums()

    def issue_seconds(self, forward_passes: Values, hooks: Values) -> Values:
        """For the processor to issue the kernels of pieces, and of those that are computed again.

        Args:
            forward_passes: in how many passes' time the forward pass is issued.
            hooks: operators that hooks on a layer's modules take as long as, in each pass.
        """
        more, again = MLP_TILES - 1, HOOKED_PASSES * MLP_TILES
        ahead, behind = OPERATORS
        beside = SHARE_OF_MODULES * hooks
        return OPERATOR_SECONDS * ((more * forward_passes + again) * (ahead + beside) + more * (behind + beside))

    def _sums(self) -> Values:
        values = sum(out * inner * count for out, inner, count in self.work.mlp_projections())
        size = 4 if self.work.precision == "fp32" else 2
        return np.where(self.work.frozen, 0.0, self.work.memory(3 * size * (MLP_TILES - 1) * values))
