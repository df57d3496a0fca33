"""`DecoderShape`: every weight of a causal decoder as a matrix, mixture-of-experts models included.

`ModelSpec` answers for the dense models that trials run. A prediction without a trace needs more: which weights a
quantisation replaces, and the experts of a sparse layer.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autotune.errors import InvalidModelError, shown
from autotune.spec.model import ModelSpec

_DENSE_SIBLING = {"qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}
"""A sparse family has the attention, the norms and the embeddings of this dense one."""
_SHAPED = ("qwen2", "qwen3", "llama", "mistral", *_DENSE_SIBLING)
"""Of the families that are traced, those whose weights are written down here."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Equal weights of linear modules."""

    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    count: int = 1

    @property
    def parameters(self) -> int:
        """Of all of them together."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True, eq=False)
class LayerShape:
    """One decoder layer; equal layers of a model are one object."""

    linear: tuple[Matrix, ...]
    """What a quantisation replaces."""
    plain: tuple[Matrix, ...]
    """What it keeps: routers, norms and biases (as one column)."""
    mlp_width: int
    """Inner width that one token passes through at once: the MLP's, or the shared expert's."""
    expert_width: int = 0
    """Inner width of one routed expert; 0 in a dense layer."""
    experts: int = 0
    experts_per_token: int = 0

    @functools.cached_property
    def linear_parameters(self) -> int:
        """Parameters of `linear`."""
        return sum(matrix.parameters for matrix in self.linear)

    @functools.cached_property
    def parameters(self) -> int:
        """All of the layer's."""
        return self.linear_parameters + sum(matrix.parameters for matrix in self.plain)


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderShape:
    """A causal decoder, layer by layer. Equal only to itself, so that it is a cheap key of caches."""

    name: str
    hidden_size: int
    num_attention_heads: int
    query_width: int
    """Query heads x head_dim."""
    key_value_width: int
    """Key heads x head_dim; as much again for values."""
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    layers: tuple[LayerShape, ...]

    @property
    def embedding(self) -> Matrix:
        """The embedding's weight; the lm head has the same shape."""
        return Matrix(self.vocab_size, self.hidden_size)

    @functools.cached_property
    def dense(self) -> bool:
        """No layer has experts."""
        return not any(layer.experts for layer in self.layers)

    @functools.cached_property
    def num_parameters(self) -> int:
        """Parameters, experts that a token skips included, a tied weight counted once."""
        heads = 1 if self.tie_word_embeddings else 2
        layers = sum(layer.parameters for layer in self.layers)
        return layers + heads * self.embedding.parameters + self.hidden_size


def read_shape(name: str, config: dict[str, Any]) -> DecoderShape:
    """The shape of a Hugging Face config.

    Args:
        name: for messages.
        config: of a `qwen2`, `qwen3`, `llama`, `mistral`, `qwen2_moe` or `qwen3_moe`.

    Raises:
        InvalidModelError: another model_type, or a key that is missing or impossible.
    """
    model_type = config.get("model_type")
    if model_type not in _SHAPED:
        raise InvalidModelError(
            f"model {name}: found model_type {shown(model_type)}, but without a trace only {', '.join(_SHAPED)} are"
            " predicted; name a model of one of these types"
        )
    sibling = _DENSE_SIBLING.get(model_type)
    spec = ModelSpec(name=name, config=config if sibling is None else {**config, "model_type": sibling})
    query, key_value = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    dense = functools.partial(functools.cache(_dense_layer), spec, query, key_value)
    sparse = functools.partial(functools.cache(_sparse_layer), spec, query, key_value)
    layers = [sparse() if _is_sparse(spec, sibling, index) else dense() for index in range(spec.num_hidden_layers)]
    return DecoderShape(
        name=name,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        query_width=query,
        key_value_width=key_value,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        tie_word_embeddings=spec.tie_word_embeddings,
        max_position_embeddings=spec.max_position_embeddings,
        layers=tuple(layers),
    )


def _attention(spec: ModelSpec, query: int, key_value: int) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
    hidden = spec.hidden_size
    linear = (Matrix(query, hidden), Matrix(key_value, hidden, 2), Matrix(hidden, query))
    plain = [Matrix(hidden, 1, 2)]  # the norms before attention and before the MLP
    if spec.model_type == "qwen2" or spec.config.get("attention_bias"):
        plain += [Matrix(query, 1), Matrix(key_value, 1, 2)]
    if spec.model_type in ("qwen3", "llama") and spec.config.get("attention_bias"):
        plain.append(Matrix(hidden, 1))
    if spec.model_type == "qwen3":
        plain.append(Matrix(spec.head_dim, 1, 2))  # the norms of q and k
    return linear, tuple(plain)


def _gated_mlp(hidden: int, inner: int, count: int = 1) -> tuple[Matrix, ...]:
    return Matrix(inner, hidden, 2 * count), Matrix(hidden, inner, count)


def _dense_layer(spec: ModelSpec, query: int, key_value: int) -> LayerShape:
    linear, plain = _attention(spec, query, key_value)
    inner = spec.intermediate_size
    if spec.model_type == "llama" and spec.config.get("mlp_bias"):
        plain = (*plain, Matrix(inner, 1, 2), Matrix(spec.hidden_size, 1))
    return LayerShape(_merged((*linear, *_gated_mlp(spec.hidden_size, inner))), plain, inner)


def _is_sparse(spec: ModelSpec, sibling: str | None, index: int) -> bool:
    """Whether a layer has experts; some layers of a sparse family may not (transformers' `decoder_sparse_step`)."""
    if sibling is None or index in (spec.config.get("mlp_only_layers") or []):
        return False
    return (index + 1) % _positive(spec, "decoder_sparse_step", 1) == 0


def _sparse_layer(spec: ModelSpec, query: int, key_value: int) -> LayerShape:
    hidden, linear, plain = spec.hidden_size, *_attention(spec, query, key_value)
    experts, width = _positive(spec, "num_experts"), _positive(spec, "moe_intermediate_size")
    linear = (*linear, *_gated_mlp(hidden, width, experts))
    plain = (*plain, Matrix(experts, hidden))
    shared = 0
    if spec.model_type == "qwen2":
        shared = _positive(spec, "shared_expert_intermediate_size")
        linear = (*linear, *_gated_mlp(hidden, shared))
        plain = (*plain, Matrix(1, hidden))
    per_token = _positive(spec, "num_experts_per_tok")
    return LayerShape(_merged(linear), plain, shared, width, experts, per_token)


def _merged(matrices: Iterable[Matrix]) -> tuple[Matrix, ...]:
    counts: dict[tuple[int, int], int] = {}
    for matrix in matrices:
        shape = (matrix.rows, matrix.columns)
        counts[shape] = counts.get(shape, 0) + matrix.count
    return tuple(Matrix(rows, columns, count) for (rows, columns), count in counts.items())


def _positive(spec: ModelSpec, key: str, absent: int | None = None) -> int:
    value = spec.config.get(key, absent)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidModelError(
            f"model {spec.name}: found {shown(value)} as {key} in its config, but a positive integer is needed;"
            " correct the config"
        )
    return value
