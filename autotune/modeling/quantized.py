"""QLoRA's frozen weights (Dettmers et al., arXiv:2305.14314): 4 bits each, by bitsandbytes, as transformers loads them.

Every linear module but the lm head becomes a `bitsandbytes.nn.Linear4bit`. A weight is 4 bits of nf4; each 64 of them
share a scale of 8 bits, and each 256 scales one of 32 bits (double quantisation): 0.516 bytes a weight in all.
Embedding, norms, biases and lm head stay in the compute dtype.
"""

from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from autotune.formats.bitsandbytes_json import to_quantization_config
from autotune.modeling.build import COMPUTE_DTYPES, checkpointed_layers, initial_weight, initializer_range
from autotune.spec.config import TrialConfig

BLOCK = 64
"""Weights of one scale; bitsandbytes' default, which transformers does not change."""


class PackedLinear(Linear4bit):  # type: ignore[misc]  # of a library without annotations
    """A `Linear4bit` whose weight is a plain parameter: bitsandbytes' own kind cannot be made of a FakeTensor, and not
    every way of moving a module keeps it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) -> (…, out)."""
        self.weight.quant_state = self.quant_state  # where the library looks for the scales
        result: torch.Tensor = super().forward(x)
        return result

    def _save_to_state_dict(self, *args: Any) -> None:
        # Without the scales: they are no parameters, by whose names checkpoints are made, and do not train.
        torch.nn.Linear._save_to_state_dict(self, *args)


def replace_linear(model: PreTrainedModel, config: TrialConfig) -> None:
    """Make the linear modules of the layers of `model`, which is on meta, quantised ones without a value, in place."""
    stated = to_quantization_config(config)
    for layer in checkpointed_layers(model):
        for name, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                with unset_fake_temporarily():  # see `build_model`
                    packed = PackedLinear(
                        module.in_features,
                        module.out_features,
                        bias=module.bias is not None,
                        compute_dtype=COMPUTE_DTYPES[config.precision],
                        compress_statistics=stated["bnb_4bit_use_double_quant"],
                        quant_type=stated["bnb_4bit_quant_type"],
                        device="meta",
                    )
                layer.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # by which PEFT knows


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether a parameter is the weight of a quantised module."""
    return isinstance(tensor, bitsandbytes.nn.Params4bit)


def write_packed_weights(model: PreTrainedModel, placed: Mapping[str, torch.device], seed: int) -> None:
    """Give the quantised modules of `model` their `initial_weight`, a matrix at a time, in place.

    Args:
        model: from `replace_linear`.
        placed: where each of the modules that make up the model is, by its name.
        seed: of the weights.
    """
    std = initializer_range(model)
    for part, device in placed.items():
        for name, module in model.get_submodule(part).named_modules(prefix=part):
            if isinstance(module, PackedLinear):
                shape = (module.out_features, module.in_features)
                whole = initial_weight(f"{name}.weight", shape, device, std, seed).to(module.compute_dtype)
                stated = {key: getattr(module.weight, key) for key in ("compress_statistics", "quant_type")}
                packed, state = quantize_4bit(whole, blocksize=BLOCK, quant_storage=module.quant_storage, **stated)
                module.weight, module.quant_state = torch.nn.Parameter(packed, requires_grad=False), state
                for key, value in stated.items():  # PEFT asks for them where it finds weights with values
                    setattr(module.weight, key, value)
