"""PEFT's `adapter_config.json`: the one translation of LoRA's fields, used by the trial and by the export."""

from typing import Any

from autotune.errors import UsageError
from autotune.formats.foreign import asking, one_line
from autotune.spec.config import TrialConfig

ADAPTER_FILE = "adapter_config.json"
"""The name by which `LoraConfig.from_pretrained` finds it in a folder."""

_MODULES = {
    "all-linear": "all-linear",  # PEFT's own word for every linear module but the lm head
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


def to_adapter_config(config: TrialConfig) -> dict[str, Any]:
    """The `LoraConfig` of `config`, which has adapters; its keys always in the same order."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _MODULES[config.lora_target_modules or "all-linear"],
        "init_lora_weights": "gaussian",
    }


def check_adapter_config(document: dict[str, Any]) -> None:
    """Load `document` the way PEFT does, and refuse what PEFT would silently ignore.

    Raises:
        UsageError: PEFT refuses the document or does not know a key.
    """
    with asking():
        from peft import LoraConfig

        try:
            read = LoraConfig.from_peft_type(**document)
        except Exception as error:  # TypeErrors, ValueErrors and what its dataclasses check
            raise UsageError(f"PEFT refuses the adapter config: {one_line(error)}") from error
    for key in document:
        if not hasattr(read, key):
            raise UsageError(f"PEFT does not know the key {key} and would ignore it")
