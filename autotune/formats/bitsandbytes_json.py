"""transformers' `BitsAndBytesConfig`: the one translation of how QLoRA quantises, used by trial and export."""

from typing import Any

from autotune.errors import UsageError
from autotune.formats.foreign import asking, one_line
from autotune.spec.config import TrialConfig

TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""torch's names, by precision."""


def to_quantization_config(config: TrialConfig) -> dict[str, Any]:
    """The arguments of `BitsAndBytesConfig` for `config`, of method qlora; always in the same order."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": TORCH_DTYPES[config.precision],
    }


def check_quantization_config(document: dict[str, Any]) -> None:
    """Load `document` the way transformers does, and refuse what it would silently ignore.

    Raises:
        UsageError: transformers refuses the document or does not know a key.
    """
    with asking():
        from transformers import BitsAndBytesConfig

        try:
            read, unused = BitsAndBytesConfig.from_dict(document, return_unused_kwargs=True)
        except Exception as error:  # TypeErrors, ValueErrors, and of the package that is not there
            raise UsageError(f"BitsAndBytesConfig refuses the arguments: {one_line(error)}") from error
    for key in document:
        if key in unused or not hasattr(read, key):
            raise UsageError(f"BitsAndBytesConfig does not know the key {key} and would ignore it")
