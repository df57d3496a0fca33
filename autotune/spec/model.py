"""`ModelSpec`: the architecture of a dense decoder, read from its Hugging Face config without any heavy library."""

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

SUPPORTED_MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral")

_MAX_CONFIG_BYTES = MIB
"""A config.json is a few KiB. Something larger is another file (a tokenizer, weights) under a wrong name."""

_MAX_HUB_ID = 96
_MAX_DIMENSION = 10**9
"""Of any size in a config. Larger ones overflow the formulas, and no model has them."""

# What transformers 5 assumes where a config.json is silent. Only keys that real files leave out are here; the others
# must be present, because a shape that we guess is a wrong prediction later.
_KEY_VALUE_HEADS_WHEN_ABSENT = {"qwen2": 32, "qwen3": 32, "mistral": 8}
_HEAD_DIM_WHEN_ABSENT = {"qwen3": 128}


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
                f"model {self.name}: found model_type {shown(model_type)}, but only dense decoders of type"
                f" {', '.join(SUPPORTED_MODEL_TYPES)} are supported; name a model of one of these types"
            )
        return str(model_type)

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
        """Inner width of the gated MLP."""
        return self._positive_integer("intermediate_size")

    @property
    def num_attention_heads(self) -> int:
        """Query heads a layer."""
        return self._positive_integer("num_attention_heads")

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads a layer; fewer than query heads in grouped-query attention."""
        # Absent and null differ in transformers: absent is the default of the class, null is one a query head.
        if "num_key_value_heads" not in self.config and self.model_type in _KEY_VALUE_HEADS_WHEN_ABSENT:
            return _KEY_VALUE_HEADS_WHEN_ABSENT[self.model_type]
        if self.config.get("num_key_value_heads") is None:
            return self.num_attention_heads
        return self._positive_integer("num_key_value_heads")

    @property
    def head_dim(self) -> int:
        """Width of one attention head. In Qwen3 heads x head_dim is not hidden_size."""
        if self.config.get("head_dim") is not None:
            return self._positive_integer("head_dim")
        if self.model_type in _HEAD_DIM_WHEN_ABSENT:
            return _HEAD_DIM_WHEN_ABSENT[self.model_type]
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
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence, in tokens, that the model was made for."""
        return self._positive_integer("max_position_embeddings")

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied weight counted once.

        With V = vocab_size, H = hidden_size, I = intermediate_size, Q = num_attention_heads x head_dim,
        K = num_key_value_heads x head_dim, L = num_hidden_layers:

            embedding              V·H
            a layer: q, k, v, o    H·Q + 2·H·K + Q·H
                     biases        Q + 2·K on qwen2, always; Q + 2·K + H on qwen3 and llama with `attention_bias`
                     gate, up, down  3·H·I, and 2·I + H of biases on llama with `mlp_bias`
                     norms         2·H (before attention and before the MLP), and 2·head_dim on qwen3 (of q and k)
            final norm             H
            lm head                V·H, nothing if tied

        Raises:
            InvalidModelError: this formula does not describe the model_type, or a key is no positive integer.
        """
        model_type = self.model_type  # first: the keys of a family that we do not know mean nothing to us
        hidden, query, key_value = self.hidden_size, self._query_width, self._key_value_width
        layer = self._layer_matmul_parameters + 2 * hidden
        if model_type == "qwen2":
            layer += query + 2 * key_value
        if model_type in ("qwen3", "llama") and self.config.get("attention_bias", False):
            layer += query + 2 * key_value + hidden
        if model_type == "llama" and self.config.get("mlp_bias", False):
            layer += 2 * self.intermediate_size + hidden
        if model_type == "qwen3":
            layer += 2 * self.head_dim
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + hidden

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs to train on one token: forward and backward, a multiply-add counted as two.

            6·N + 12·L·Q·s

        N: weights that a token is multiplied with (q, k, v, o, gate, up, down of every layer, and the lm head, tied or
        not; not the embedding, which is a lookup). 2·N forward, 4·N backward. L = num_hidden_layers, Q =
        num_attention_heads x head_dim, s = sequence_length in tokens: q·kᵀ and attention·v are 2·Q·s each a layer
        forward, three times that with the backward.

        Left out: the optimizer, norms, biases, softmax, rotary embedding, activation function, residual sums and the
        loss; the recomputation of activation checkpointing (this is model FLOPs, not hardware FLOPs). Attention is
        counted over the whole square, without the half that causal masking lets a kernel skip: so do the published
        figures of model FLOPs utilization.
        Source: PaLM, arXiv:2204.02311, appendix B.

        Raises:
            InvalidModelError: see `num_parameters`.
        """
        _ = self.model_type
        matmul = self.num_hidden_layers * self._layer_matmul_parameters + self.vocab_size * self.hidden_size
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

    @property
    def _layer_matmul_parameters(self) -> int:
        attention = 2 * self.hidden_size * (self._query_width + self._key_value_width)
        return attention + 3 * self.hidden_size * self.intermediate_size

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
        InvalidModelError: neither exists, or the config is not one of a dense decoder that we know.
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
