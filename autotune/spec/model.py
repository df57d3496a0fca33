"""`ModelSpec`: the architecture of a causal decoder, read from its Hugging Face config without any heavy library."""

import copy
import difflib
import functools
import hashlib
import json
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autotune.errors import InvalidModelError, shown
from autotune.units import MIB

_MAX_CONFIG_BYTES = MIB
"""A config.json is a few KiB. Something larger is another file (a tokenizer, weights) under a wrong name."""

_MAX_HUB_ID = 96
_MAX_DIMENSION = 10**9
"""Of any size in a config. Larger ones overflow the formulas, and no model has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How transformers 5 builds the layers of one model_type. A string is the key of the config that decides."""

    query_key_value_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    gated_mlp: bool = True
    """Three matrices (gate, up, down), or two."""
    layer_norms: int = 2
    """Norms a layer over the hidden size."""
    norm_bias: bool = False
    """A norm has a bias besides its weight (LayerNorm and not RMSNorm)."""
    head_norms: bool | str = False
    """Norms of queries and keys, over one head."""
    experts: str = ""
    """The key with the number of experts of a sparse layer; empty in dense families."""
    expert_width: str = "moe_intermediate_size"
    shared_expert: bool = False
    """Besides the routed experts one, with its gate, that every token passes through."""
    absent: dict[str, int | bool] = field(default_factory=dict)
    """What transformers assumes where a config.json is silent. Only keys that real files leave out; others must be
    present, because a shape that we guess is a wrong prediction later."""


_BIASED: dict[str, Any] = {"query_key_value_bias": "attention_bias", "output_bias": "attention_bias"}
_GEMMA2: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}

FAMILIES = {
    "qwen2": Family(query_key_value_bias=True, absent={"num_key_value_heads": 32}),
    "qwen3": Family(**_BIASED, head_norms=True, absent={"num_key_value_heads": 32, "head_dim": 128}),
    "llama": Family(**_BIASED, mlp_bias="mlp_bias"),
    "mistral": Family(absent={"num_key_value_heads": 8}),
    "qwen2_moe": Family(
        query_key_value_bias="qkv_bias",
        experts="num_experts",
        shared_expert=True,
        absent={"num_key_value_heads": 16, "qkv_bias": True},
    ),
    "qwen3_moe": Family(**_BIASED, head_norms=True, experts="num_experts", absent={"num_key_value_heads": 4}),
    "mixtral": Family(experts="num_local_experts", expert_width="intermediate_size", absent={"num_key_value_heads": 8}),
    "gemma": Family(**_BIASED, absent=_GEMMA2 | {"num_key_value_heads": 16}),
    "gemma2": Family(**_BIASED, layer_norms=4, absent=_GEMMA2),
    "gemma3_text": Family(**_BIASED, layer_norms=4, head_norms=True, absent=_GEMMA2),
    "phi": Family(
        query_key_value_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        gated_mlp=False,
        layer_norms=1,
        norm_bias=True,
        head_norms="qk_layernorm",
    ),
    "phi3": Family(),
}
"""By model_type."""

SUPPORTED_MODEL_TYPES = tuple(FAMILIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """An architecture. Two specs are equal when name and config are."""

    name: str
    """What the user wrote after `model:`."""
    config: dict[str, Any] = field(hash=False, repr=False)
    """The Hugging Face config as plain JSON data."""

    @property
    def model_type(self) -> str:
        """Family, by its transformers name such as `qwen3`."""
        model_type = self.config.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise InvalidModelError(
                f"model {self.name}: found model_type {shown(model_type)}, but only decoders of type"
                f" {', '.join(SUPPORTED_MODEL_TYPES)} are supported; name a model of one of these types"
            )
        return str(model_type)

    @property
    def family(self) -> Family:
        """How layers of this model_type are built.

        Raises:
            InvalidModelError: the model_type is not in `FAMILIES`.
        """
        return FAMILIES[self.model_type]

    def has(self, part: bool | str) -> bool:
        """Whether an optional part of the `family` is there: as the family says, or the config's key that it names."""
        return bool(self._or_absent(part, False)) if isinstance(part, str) else part

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        return self._positive_integer("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self._positive_integer("hidden_size")

    @property
    def intermediate_size(self) -> int:
        """Inner width of the MLP, in layers without experts."""
        return self._positive_integer("intermediate_size")

    @property
    def num_attention_heads(self) -> int:
        """Query heads a layer."""
        return self._positive_integer("num_attention_heads")

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads a layer; fewer than query heads in grouped-query attention."""
        # Absent and null differ in transformers: absent is the default of the class, null is one a query head.
        if self._or_absent("num_key_value_heads", None) is None:
            return self.num_attention_heads
        if "num_key_value_heads" not in self.config:
            return int(self.family.absent["num_key_value_heads"])
        return self._positive_integer("num_key_value_heads")

    @property
    def head_dim(self) -> int:
        """Width of one attention head. In Qwen3 heads x head_dim is not hidden_size."""
        if self.config.get("head_dim") is not None:
            return self._positive_integer("head_dim")
        if "head_dim" in self.family.absent:
            return int(self.family.absent["head_dim"])
        if self.hidden_size % self.num_attention_heads:
            raise InvalidModelError(
                f"model {self.name}: found hidden_size {self.hidden_size} in its config, which is no multiple of"
                f" num_attention_heads {self.num_attention_heads}; correct config.json"
            )
        return self.hidden_size // self.num_attention_heads

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding rows included."""
        return self._positive_integer("vocab_size")

    @property
    def tie_word_embeddings(self) -> bool:
        """The lm head shares the embedding's weight."""
        return self.has("tie_word_embeddings")

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence, in tokens, that the model was made for."""
        return self._positive_integer("max_position_embeddings")

    @property
    def num_experts(self) -> int:
        """Routed experts of a sparse layer; 0 in a dense family."""
        return self._positive_integer(self.family.experts) if self.family.experts else 0

    @property
    def num_experts_per_token(self) -> int:
        """Routed experts that one token passes through; 0 in a dense family."""
        return self._positive_integer("num_experts_per_tok") if self.family.experts else 0

    @property
    def expert_width(self) -> int:
        """Inner width of one routed expert; 0 in a dense family."""
        return self._positive_integer(self.family.expert_width) if self.family.experts else 0

    @property
    def shared_expert_width(self) -> int:
        """Inner width of the expert that every token passes through; 0 where there is none."""
        return self._positive_integer("shared_expert_intermediate_size") if self.family.shared_expert else 0

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts; a sparse family may have dense layers among them."""
        if not self.family.experts or layer in (self.config.get("mlp_only_layers") or []):
            return False
        step = self._positive_integer("decoder_sparse_step") if "decoder_sparse_step" in self.config else 1
        return (layer + 1) % step == 0

    @property
    def num_parameters(self) -> int:
        """Parameters, experts that a token skips included, a tied weight counted once.

        With V = vocab_size, H = hidden_size, I = intermediate_size, Q = num_attention_heads x head_dim,
        K = num_key_value_heads x head_dim, L = num_hidden_layers:

            embedding              V·H
            a layer: q, k, v, o    H·Q + 2·H·K + Q·H, and biases Q + 2·K and H
                     MLP           3·H·I (gate, up, down) or 2·H·I, and a bias for each output
                     or experts    E·3·H·M, a router E·H, and with a shared expert of width S 3·H·S + H (its gate)
                     norms         so many times H, and two of head_dim where queries and keys have norms
            final norm             H
            lm head                V·H, nothing if tied, and a bias V

        E experts of width M. Which biases and norms there are is the `family`'s; a norm with a bias counts twice.

        Raises:
            InvalidModelError: this formula does not describe the model_type, or a key is no positive integer.
        """
        family = self.family  # first: the keys of a family that we do not know mean nothing to us
        hidden, query, key_value, layers = (
            self.hidden_size,
            self._query_width,
            self._key_value_width,
            self.num_hidden_layers,
        )
        norm = 2 if family.norm_bias else 1
        layer = norm * hidden * family.layer_norms
        layer += self.has(family.query_key_value_bias) * (query + 2 * key_value)
        layer += self.has(family.output_bias) * hidden
        layer += self.has(family.head_norms) * 2 * norm * self.head_dim
        sparse = sum(map(self.is_sparse, range(layers)))
        mlp_bias = (self.intermediate_size * (2 if family.gated_mlp else 1) + hidden) * self.has(family.mlp_bias)
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return (
            embeddings
            + family.head_bias * self.vocab_size
            + norm * hidden
            + layers * layer
            + (layers - sparse) * mlp_bias
            + self._matmul_parameters(sparse, self.num_experts)
        )

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs to train on one token: forward and backward, a multiply-add counted as two.

            6·N + 12·L·Q·s

        N: weights that a token is multiplied with (q, k, v, o, gate, up, down of every layer, of experts those that one
        token passes through and the router, and the lm head, tied or not; not the embedding, which is a lookup). 2·N
        forward, 4·N backward. L = num_hidden_layers, Q =
        num_attention_heads x head_dim, s = sequence_length in tokens: q·kᵀ and attention·v are 2·Q·s each a layer
        forward, three times that with the backward.

        Left out: the optimizer, norms, biases, softmax, rotary embedding, activation function, residual sums and the
        loss; the recomputation of activation checkpointing (this is model FLOPs, not hardware FLOPs). Attention is
        counted over the whole square, though causal masking lets a kernel skip half of it and a sliding window more: so
        do the published figures of model FLOPs utilization.
        Source: PaLM, arXiv:2204.02311, appendix B.

        Raises:
            InvalidModelError: see `num_parameters`.
        """
        sparse = sum(map(self.is_sparse, range(self.num_hidden_layers)))
        matmul = self._matmul_parameters(sparse, self.num_experts_per_token) + self.vocab_size * self.hidden_size
        return 6.0 * matmul + 12.0 * self.num_hidden_layers * self._query_width * sequence_length

    @property
    def digest(self) -> str:
        """Sixteen hex digits that are equal exactly for equal configs, whatever the name and the order of keys."""
        canonical = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def _query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def _key_value_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def _matmul_parameters(self, sparse: int, experts: int) -> int:
        """Weights of matrices in all layers, of which `sparse` have experts, and those `experts` each."""
        hidden, layers = self.hidden_size, self.num_hidden_layers
        attention = 2 * hidden * (self._query_width + self._key_value_width)
        mlp = (3 if self.family.gated_mlp else 2) * hidden * self.intermediate_size if sparse < layers else 0
        routed = 3 * hidden * self.expert_width * experts + hidden * self.num_experts
        shared = (3 * self.shared_expert_width + 1) * hidden if self.family.shared_expert else 0
        return layers * attention + (layers - sparse) * mlp + sparse * (routed + shared)

    def _or_absent(self, key: str, otherwise: Any) -> Any:
        return self.config.get(key, self.family.absent.get(key, otherwise))

    def _positive_integer(self, key: str) -> int:
        value = self.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_DIMENSION:
            found = "no" if key not in self.config else f"{shown(value)} as"
            raise InvalidModelError(
                f"model {self.name}: found {found} {key} in its config, but a positive integer of at most"
                f" {_MAX_DIMENSION} is needed; correct config.json"
            )
        return value


def load_model(reference: str, relative_to: Path) -> ModelSpec:
    """Find the architecture that `reference` names.

    Args:
        reference: a shipped architecture's name, which wins, or a folder that holds a config.json.
        relative_to: the folder from which a relative path is meant: that of the search-space file.

    Raises:
        InvalidModelError: neither exists, or the config is not one of a decoder that we know.
    """
    shipped = _shipped_architectures()
    if reference in shipped:
        return ModelSpec(name=reference, config=copy.deepcopy(shipped[reference]))
    folder = _folder(reference, relative_to)
    if folder is None:
        raise InvalidModelError(_unknown_model(reference, relative_to))
    model = ModelSpec(name=reference, config=_read_config(reference, folder / "config.json"))
    # Ask now for everything that is asked later, so that a bad file is an error before the first trial.
    _ = (model.num_parameters, model.max_position_embeddings)
    return model


def _folder(reference: str, relative_to: Path) -> Path | None:
    if not reference.strip():
        return None
    try:
        folder = relative_to / Path(reference).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):  # too long, closed to us, a user that does not exist after `~`
        return None


@functools.cache
def _shipped_architectures() -> dict[str, dict[str, Any]]:
    """The table of architectures.yaml; its dotted keys are fragments that others are made of."""
    text = Path(__file__).with_name("architectures.yaml").read_text(encoding="utf-8")
    return {name: config for name, config in yaml.safe_load(text).items() if not name.startswith(".")}


def _unknown_model(reference: str, relative_to: Path) -> str:
    names = sorted(_shipped_architectures())
    # Compared without case and without the owner, since `qwen3-32b` is what people write.
    by_short_name = {name.lower().split("/")[-1]: name for name in names}
    near = difflib.get_close_matches(reference.lower().split("/")[-1], by_short_name, n=3, cutoff=0.6)
    meant = " or ".join(by_short_name[name] for name in near)
    known = f"did you mean {meant}" if near else f"known are {', '.join(names)}"
    download = ""
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", reference) and len(reference) <= _MAX_HUB_ID:
        download = f", made for example by `hf download {reference} config.json --local-dir DIR`"
    return (
        f"model {shown(reference)} is neither a shipped architecture ({known}) nor a folder in {relative_to};"
        f" a folder with a config.json works as well{download}"
    )


def _read_config(reference: str, path: Path) -> dict[str, Any]:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # a pipe or a device may never end
            raise InvalidModelError(
                f"model {reference}: {path} is no regular file; put the model's own config.json there"
            )
        if found.st_size > _MAX_CONFIG_BYTES:
            raise InvalidModelError(
                f"model {reference}: {path} has {found.st_size} bytes, but a Hugging Face config has at most"
                f" {_MAX_CONFIG_BYTES}; put the model's own config.json there"
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidModelError(
            f"model {reference}: the folder has no config.json; put the Hugging Face config of the model at {path}"
        ) from None
    except OSError as error:
        raise InvalidModelError(
            f"model {reference}: {path} cannot be read ({error.strerror}); make it a readable file"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON and bad UTF-8 alike
        raise InvalidModelError(
            f"model {reference}: {path} is not JSON ({error}); put the model's own config.json there"
        ) from error
    if not isinstance(config, dict):
        raise InvalidModelError(
            f"model {reference}: {path} holds a {type(config).__name__}, but a Hugging Face config is a JSON object;"
            " put the model's own config.json there"
        )
    return config
