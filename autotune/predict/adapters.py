"""What LoRA's adapters, and weights in 4 bits, add to the passes of one decoder layer on one GPU.

With n tokens, r the rank, t the tensor-parallel size, and a matrix of `out` rows and `in` columns that has an adapter:

    matmul         n x in by in x r/t and n x r by r x out/t; twice as many backward
    elementwise    bytes for each value of the input and of the output, counted over PEFT 0.21's operators
                   (tuners/lora/layer.py, `Linear.forward`), and the gap before each kernel
    quantised      each pass writes a matrix in the compute dtype from 4 bits a weight (bitsandbytes,
                   autograd/_functions.py, `MatMul4Bit`)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.predict.kernels import Values, kernel_rates, matmul_seconds, memory_seconds
from autotune.predict.network import Counts
from autotune.predict.roofline import LayerWork, Parts, TimePart
from autotune.predict.shape import DecoderShape
from autotune.predict.step import OPERATOR_SECONDS

BYTES = ((0, 10), (6, 4))
"""(a value of the input, of the output), forward and backward: B's output scaled 4 and summed 6; backward scaled 4, and
the gradient of the input summed with the matrix's own 6."""
CAST_BYTES = (12, 12)
"""A value of the input, forward and backward, where adapters are fp32 under autocast: up 6 and down again 6."""
KERNELS = (4, 8)
"""Of one adapter, forward and backward: two products, scaled, summed."""
CAST_KERNELS = (4, 4)
DEQUANTIZED_BYTES = 2.52
"""A weight: 4 bits and a 64th of 8 read, 16 bits written."""


def adapted(
    shape: DecoderShape, on_attention: NDArray[np.bool_], on_mlp: NDArray[np.bool_]
) -> Iterator[tuple[int, int, int, NDArray[np.bool_]]]:
    """(outputs, inputs, number, where they have adapters) of a layer's matrices."""
    hidden, query, key_value = shape.hidden_size, shape.query_width, shape.key_value_width
    inner = shape.layers[0].mlp_width
    yield query, hidden, 1, on_attention
    yield key_value, hidden, 2, on_attention
    yield hidden, query, 1, on_attention
    yield inner, hidden, 2, on_mlp
    yield hidden, inner, 1, on_mlp


def layer_parameters(
    shape: DecoderShape, rank: Counts, on_attention: NDArray[np.bool_], on_mlp: NDArray[np.bool_]
) -> Values:
    """Of one layer's adapters, over all tensor-parallel ranks."""
    matrices = adapted(shape, on_attention, on_mlp)
    return np.asarray(sum(where * count * rank * float(out + inner) for out, inner, count, where in matrices))


@dataclass(frozen=True, slots=True)
class AdapterWork:
    """The adapters of the layers of one model on one micro-batch, in columns."""

    work: LayerWork
    """Of the layers that they are in."""
    rank: Counts
    """0 without adapters."""
    on_attention: NDArray[np.bool_]
    on_mlp: NDArray[np.bool_]
    quantized: NDArray[np.bool_]
    """Whether all matrices of the layer are held in 4 bits."""
    casts: bool
    """Adapters are fp32 and products are not."""

    def layer(self, *, backward: bool) -> Parts:
        """One pass of the adapters of one layer, on one rank."""
        work, tensor = self.work, self.work.tensor
        rank = np.maximum(self.rank, 1).astype(float)
        products, moved, kernels = np.zeros_like(tensor), np.zeros_like(tensor), np.zeros_like(tensor)
        of_input, of_output = BYTES[backward]
        of_input += CAST_BYTES[backward] * self.casts
        each = KERNELS[backward] + CAST_KERNELS[backward] * self.casts
        scale = 2.0 if work.precision == "fp32" else 1.0
        for out, inner, count, where in adapted(work.shape, self.on_attention, self.on_mlp):
            here = where & (self.rank > 0)
            pair = self._product(rank / tensor, np.full_like(tensor, inner), backward=backward)
            pair = pair + self._product(out / tensor, rank, backward=backward)
            products += here * count * pair
            moved += here * count * scale * work.tokens * (of_input * inner + of_output * out) / tensor
            kernels += here * count * each
        matrices = work.shape.layers[0].linear_parameters / tensor
        moved += self.quantized * DEQUANTIZED_BYTES * matrices
        return {
            TimePart.MATMUL: products,
            TimePart.ELEMENTWISE: memory_seconds(work.gpu, moved) + kernels * kernel_rates(work.gpu).launch_seconds,
        }

    def issue_seconds(self, *, backward: bool) -> Values:
        """For the processor to issue one pass of the adapters of one layer."""
        each = KERNELS[backward] + CAST_KERNELS[backward] * self.casts
        matrices = adapted(self.work.shape, self.on_attention, self.on_mlp)
        count = sum(where * count for _, _, count, where in matrices)
        return np.asarray(OPERATOR_SECONDS * each * (self.rank > 0) * count)

    def _product(self, out: Values, inner: Values, *, backward: bool) -> Values:
        work = self.work
        if not backward:
            return matmul_seconds(work.gpu, work.precision, work.tokens, out, inner)
        of_input = matmul_seconds(work.gpu, work.precision, work.tokens, inner, out)
        return of_input + matmul_seconds(work.gpu, work.precision, out, inner, work.tokens)
