"""What one decoder layer costs on one GPU: its products, its attention, the bytes of everything else.

All sizes are columns, arrays with one value a candidate. With n tokens of sequences of s, t the tensor-parallel size, h
hidden_size, Q and K query and key heads x head_dim, I the MLP's inner width, V vocab_size:

    matmul         n x inner by inner x out for each projection; twice as many backward, for the gradients of its input
                   and of its weight
    attention      2·n·s·Q/t FLOPs under the causal mask, 2.5 times that backward (Dao, arXiv:2307.08691, section 3);
                   where scores are stored, 4·n·s·Q/t, twice that backward, and the scores' bytes
    elementwise    bytes for each value of h, Q, K and I, and the gap before each kernel, counted over the library's
                   kernels (`KernelProfile`)
    lm head        the products of n x h by h x V/t; the loss's bytes for each of n·V/t logits

`kernels.py` turns them into seconds.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from autotune.predict.kernels import Values, attention_seconds, kernel_rates, matmul_seconds, memory_seconds, peak_flops
from autotune.predict.shape import DecoderShape
from autotune.spec.cluster import GpuSpec


class TimePart(StrEnum):
    """What a step spends its time on. The parts add up to the step."""

    MATMUL = "matmul"
    """The projections' products, forward and backward."""
    ATTENTION = "attention"
    ELEMENTWISE = "elementwise"
    """Norms, residual sums, rotary embedding, copies, activation; casts of weights."""
    LOGITS = "logits"
    """The lm head, the loss, and the gradient of the embedding."""
    ACCUMULATION = "accumulation"
    """Adding a micro-batch's gradients to the sum."""
    RECOMPUTATION = "recomputation"
    """The forward pass once more, of what is checkpointed."""
    LAUNCH = "launch"
    """What the processor needs longer to issue the work than the GPU to do it."""
    TENSOR_PARALLEL = "tensor_parallel"
    """Collectives inside the layers, less what products hide."""
    PIPELINE_TRANSFER = "pipeline_transfer"
    """Activations and their gradients between stages."""
    BUBBLE = "bubble"
    """Filling and draining the pipeline."""
    GRADIENT_REDUCTION = "gradient_reduction"
    """Over the data-parallel ranks, less what the backward pass hides."""
    PARAMETER_GATHER = "parameter_gather"
    """Of sharded parameters, less what computation hides."""
    OPTIMIZER = "optimizer"
    """Norm, clipping, AdamW, and the copy to the compute dtype."""
    OFFLOAD = "offload"
    """To and from host memory, and the processor's Adam."""


Parts = dict[TimePart, Values]


def total(parts: Parts) -> Values:
    """Seconds of all parts together."""
    seconds: Values = np.sum(np.broadcast_arrays(*parts.values()), axis=0)
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelProfile:
    """How a library runs a decoder: bytes with 2 a value, counted over its kernels, and what its processor issues."""

    forward_bytes: tuple[float, float, float, float]
    """Read and written a token for each value of h, Q, K and I."""
    backward_bytes: tuple[float, float, float, float]
    logit_bytes: float
    """Read and written a logit, forward and backward together."""
    started: tuple[int, int]
    """Kernels of a layer, forward and backward."""
    fused_projections: bool
    """q, k and v are one product, and so are gate and up."""
    score_bytes: float = 0.0
    """Read and written a score, forward; 0 where flash attention stores none."""
    attention_speed: float = 1.0
    """Of flash attention, as a multiple of FlashAttention-2's."""


NANOTRON_KERNELS = KernelProfile(
    # Forward: two norms 4 each, two residual sums 6 each; q permuted 4, rotated 4, transposed back 4; k and v permuted
    # 8, joined 8, permuted again 8, k rotated 4; silu 4, product 6. Backward: norms 6, sums 6 each; the copies again;
    # q's flash gradient 4; the product 12, silu 6, gate's and up's gradients joined 8.
    forward_bytes=(20, 12, 28, 10),
    backward_bytes=(24, 16, 28, 26),
    # Read and cast 6; maximum 4, subtracted 8, exp 8, sum 4, divided 8; backward, clone 8, times gradient 8, cast 6.
    logit_bytes=60,
    started=(23, 32),
    fused_projections=True,
)
"""huggingface/nanotron at 67c5ebb6: models/llama.py, parallel/tensor_parallel/functional.py and nn.py."""

MEGATRON_KERNELS = KernelProfile(
    # Norms 4 each, fused bias, dropout and sum 7 each; attention's transposes; activation with its bias in one kernel.
    forward_bytes=(22, 8, 12, 4),
    backward_bytes=(26, 8, 12, 6),
    logit_bytes=46,
    started=(15, 21),
    fused_projections=True,
)
"""NVIDIA/Megatron-LM: core/fusions, core/tensor_parallel/cross_entropy.py. With flash attention."""

TRANSFORMERS_KERNELS = KernelProfile(
    # A norm in eager PyTorch: cast 6, square 8, mean 4, times rsqrt 8, cast 6, times weight 4; sums 6. Rotary: negate
    # 2, join 4, two products 8, sum 6. Backward, each of these reads the gradient as well. Kernels: ATen operators less
    # views, as `benchmarks/fit_kernels.py` runs them.
    forward_bytes=(84, 26, 24, 10),
    backward_bytes=(132, 34, 30, 18),
    logit_bytes=62,
    started=(56, 111),
    fused_projections=False,
)
"""huggingface/transformers: models/qwen3/modeling_qwen3.py, loss/loss_utils.py."""

EAGER_SCORE_BYTES = 26
"""transformers' eager attention: product 2, scaled 4, mask added 4, softmax in fp32 with its casts 14, read again 2."""

MLP_KERNELS = (2, 4)
"""Of transformers' MLP beside its products, forward and backward: activation and gate; their gradients, and the sum of
the two of what gate and up read."""

SCORE_KERNELS = (4, 6)
"""Where scores are stored, forward and backward: products, softmax and dropout."""


@dataclass(frozen=True, slots=True)
class LayerWork:
    """The layers of one model on one micro-batch, in columns."""

    shape: DecoderShape
    gpu: GpuSpec
    kernels: KernelProfile
    precision: str
    tokens: Values
    """n."""
    length: Values
    """s."""
    tensor: Values
    """t."""
    splits_norms: bool = True
    """Whether tensor parallelism splits the sequence where values are h wide; otherwise each of its ranks has all of
    them (Korthikanti et al., arXiv:2205.05198, section 4.1)."""
    frozen: NDArray[np.bool_] | bool = False
    """Where weights do not train, and have no gradients of their own."""

    def layer(self, *, backward: bool) -> Parts:
        """One pass of one layer, without communication."""
        sizes = self.kernels.backward_bytes if backward else self.kernels.forward_bytes
        shape, layer = self.shape, self.shape.layers[0]
        widths = (shape.hidden_size, shape.query_width, shape.key_value_width, layer.mlp_width)
        shares = (self.tensor if self.splits_norms else 1.0, self.tensor, self.tensor, self.tensor)
        moved = sum(size * width / share for size, width, share in zip(sizes, widths, shares, strict=True))
        products = sum(count * self._product(out, inner, backward=backward) for out, inner, count in self.projections())
        return {
            TimePart.MATMUL: np.asarray(products, float),
            TimePart.ATTENTION: self._attention(backward=backward),
            TimePart.ELEMENTWISE: self.memory(moved * self._value_scale * self.tokens) + self._gaps(backward=backward),
        }

    def mlp(self, *, backward: bool) -> Values:
        """Seconds of one pass of a layer's MLP, which are among those of the layer."""
        products = sum(
            count * self._product(out, inner, backward=backward) for out, inner, count in self.mlp_projections()
        )
        each = (self.kernels.backward_bytes if backward else self.kernels.forward_bytes)[3]
        moved = self.memory(each * self._value_scale * self._split(self.shape.layers[0].mlp_width) * self.tokens)
        return products + moved + MLP_KERNELS[backward] * kernel_rates(self.gpu).launch_seconds

    def head(self, *, backward: bool) -> Values:
        """One pass of the lm head and half of the loss's bytes."""
        products = self._product(self._split(self.shape.vocab_size), self._whole, backward=backward)
        logits = self.tokens * self.shape.vocab_size / self.tensor
        return products + self.memory(self._value_scale * self.kernels.logit_bytes / 2 * logits)

    def memory(self, size: Values | float) -> Values:
        """Seconds to move bytes of device memory."""
        return memory_seconds(self.gpu, size)

    def embedding_gradient(self) -> Values:
        """A zeroed matrix of the embedding's size, added to."""
        seconds = self.memory(4 * self._value_scale * self.shape.embedding.parameters / self.tensor)
        return np.where(self.frozen, 0.0, seconds)

    def projections(self) -> Iterator[tuple[Values, Values, int]]:
        """Outputs, inputs and number of a layer's products, as a rank has them."""
        query, key_value = map(self._split, (self.shape.query_width, self.shape.key_value_width))
        up, down = self.mlp_projections()
        if self.kernels.fused_projections:
            yield query + 2 * key_value, self._whole, 1
        else:
            yield from ((query, self._whole, 1), (key_value, self._whole, 2))
        yield from (up, (self._whole, query, 1), down)

    def mlp_projections(self) -> Iterator[tuple[Values, Values, int]]:
        """Those of the MLP, into it and out of it.

        There are as many up projections as its parameters tell: two with a gate, one without.
        """
        shape, layer = self.shape, self.shape.layers[0]
        attention = 2 * shape.hidden_size * (shape.query_width + shape.key_value_width)
        ups = round((layer.linear_parameters - attention) / (shape.hidden_size * layer.mlp_width)) - 1
        inner = self._split(layer.mlp_width)
        yield (ups * inner, self._whole, 1) if self.kernels.fused_projections else (inner, self._whole, ups)
        yield self._whole, inner, 1

    def column_gradients(self) -> Iterator[tuple[Values, Values]]:
        """Seconds of the gradients of input and weight, for each fused projection that is split by its outputs."""
        for out, inner, _ in list(self.projections())[:2]:
            of_input, of_weight = self._passes(out, inner, backward=True)
            yield of_input, of_weight

    @property
    def _value_scale(self) -> float:
        return 2.0 if self.precision == "fp32" else 1.0

    @property
    def _whole(self) -> Values:
        return np.full_like(self.tensor, float(self.shape.hidden_size))

    def _split(self, width: int) -> Values:
        return width / self.tensor

    def _product(self, out: Values, inner: Values, *, backward: bool) -> Values:
        """Seconds of one pass of one projection."""
        first, *of_weight = self._passes(out, inner, backward=backward)
        return first + sum(np.where(self.frozen, 0.0, seconds) for seconds in of_weight)

    def _passes(self, out: Values, inner: Values, *, backward: bool) -> tuple[Values, ...]:
        product = functools.partial(matmul_seconds, self.gpu, self.precision)
        if backward:
            return product(self.tokens, inner, out), product(out, inner, self.tokens)
        return (product(self.tokens, out, inner),)

    def _gaps(self, *, backward: bool) -> float:
        """Seconds between the kernels of one pass."""
        return self.kernels.started[backward] * kernel_rates(self.gpu).launch_seconds

    def _attention(self, *, backward: bool) -> Values:
        shape, square = self.shape, self.tokens * self.length / self.tensor
        if not self.kernels.score_bytes:
            flops = (5 if backward else 2) * square * shape.query_width
            flops = flops / self.kernels.attention_speed
            return attention_seconds(self.gpu, self.precision, flops, self.length, shape.head_dim, backward=backward)
        passes = 2 if backward else 1
        moved = passes * self._value_scale * self.kernels.score_bytes * square * shape.num_attention_heads
        reached = kernel_rates(self.gpu).matmul_efficiency * peak_flops(self.gpu, self.precision)
        started = SCORE_KERNELS[backward] * kernel_rates(self.gpu).launch_seconds
        return started + memory_seconds(self.gpu, moved) + passes * 4 * square * shape.query_width / reached


def flops_per_token(shape: DecoderShape, length: NDArray[np.generic]) -> Values:
    """FLOPs to train on one token, as `ModelSpec.flops_per_token` counts them."""
    weights = sum(layer.linear_parameters for layer in shape.layers) + shape.embedding.parameters
    return 6.0 * weights + 12.0 * len(shape.layers) * shape.query_width * np.asarray(length, float)
