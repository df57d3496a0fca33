"""DeepSpeed's JSON: the one translation of a `TrialConfig`, used by the trial and by the export.

Every number is explicit. Nothing here serves only a CPU run: what a CPU needs besides is an overlay of
`autotune.engines.deepspeed` and is never exported. `train_batch_size` is left out, because DeepSpeed asserts it against
a world size that does not exist where a file is checked.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from autotune.errors import UsageError
from autotune.spec.config import Scalar, TrialConfig
from autotune.spec.workload import Workload

QUIET_STEPS_PER_PRINT = 1_000_000_000
"""DeepSpeed prints its step statistics every 10 steps unless told otherwise; JSON has no infinity."""

OWNED_KEYS = {
    "train_batch_size": "it follows from workload.global_batch_size",
    "train_micro_batch_size_per_gpu": "use the axis micro_batch_size",
    "gradient_accumulation_steps": "it follows from workload.global_batch_size and micro_batch_size",
    "gradient_clipping": "set workload.max_gradient_norm",
    "bf16.enabled": "use the axis precision",
    "bfloat16": "use the axis precision",
    "fp16.enabled": "use the axis precision",
    "torch_autocast": "use the axis precision",
    "zero_optimization.stage": "use the axis zero_stage",
    "zero_optimization.offload_optimizer.device": "use the axis offload",
    "zero_optimization.offload_param.device": "use the axis offload",
    "zero_optimization.cpu_offload": "use the axis offload",
    "zero_optimization.cpu_offload_params": "use the axis offload",
    "optimizer.type": "Autotune measures with AdamW",
    "optimizer.params.lr": "set workload.learning_rate",
    "optimizer.params.weight_decay": "set workload.weight_decay",
    "activation_checkpointing": "transformers has its own; use the axis activation_checkpointing",
    "tensor_parallel": "use the axis tensor_parallel_size",
    "sequence_parallel_size": "it is an axis of its own",
    "steps_per_print": "Autotune keeps DeepSpeed quiet",
}
"""Keys, or whole sections, that Autotune writes itself, with what to use instead."""

TRAINING_KEYS = (
    "bf16.bf16_master_weights_and_grads",
    "bf16.bf16_optimizer_states",
    "fp16.fp16_master_weights_and_grads",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "data_types.grad_accum_dtype",
    "communication_data_type",
)
"""Keys that change the numbers of training, which a search for speed must not do unasked."""


def to_deepspeed(config: TrialConfig, workload: Workload) -> dict[str, Any]:
    """The DeepSpeed config of `config`, its keys always in the same order.

    Raises:
        UsageError: `config.deepspeed` sets a key that is not free, or parameters are offloaded below ZeRO stage 3.
        ValueError: the global batch does not divide.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.offload == "optimizer+parameters":
        if config.zero_stage != 3:
            raise UsageError(f"offload optimizer+parameters needs zero_stage 3, not {config.zero_stage}")
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    document: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": workload.gradient_accumulation_steps(config),
        "gradient_clipping": workload.max_gradient_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_optimization": zero,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": workload.learning_rate, "weight_decay": workload.weight_decay},
        },
        "steps_per_print": QUIET_STEPS_PER_PRINT,
    }
    for key, value in config.deepspeed:
        if reason := _not_free(key):
            raise UsageError(reason)
        set_dotted(document, key, value)
    return document


def set_dotted(document: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries, making the sections on the way.

    Raises:
        UsageError: something on the way is a value, not a section.
    """
    *sections, last = key.split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise UsageError(f"DeepSpeed key {key}: {section} is a value, not a section")
    document[last] = value


def check_deepspeed(document: dict[str, Any]) -> None:
    """Load `document` the way DeepSpeed does, and refuse what DeepSpeed would silently ignore.

    DeepSpeed validates the sections that are pydantic models, and reads everything else key by key with a default: a
    typo at the top level, or `activation_checkpointing.enabled`, changes nothing and says nothing. Which keys it reads
    is not written down anywhere, so the document is handed over in dictionaries that record what is asked of them.

    Raises:
        UsageError: DeepSpeed refuses the document or does not know a key.
    """
    load = _deepspeed_config_class()
    recording = _Recording(document)
    try:
        load(recording)
    except Exception as error:  # DeepSpeed raises asserts, ValueErrors, pydantic's and its own
        raise UsageError(f"DeepSpeed refuses the config: {_one_line(error)}") from error
    for key in recording.unread():
        raise UsageError(f"DeepSpeed does not know the key {key} and would ignore it; remove it or correct its name")


def deepspeed_key_error(key: str, value: Scalar) -> str | None:
    """Why `key` (dotted) with `value` cannot be an axis of the search; None if it can."""
    if reason := _not_free(key):
        return reason
    document: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    try:
        set_dotted(document, key, value)
        check_deepspeed(document)
    except UsageError as error:
        return str(error)
    return None


def _deepspeed_config_class() -> Callable[[dict[str, Any]], object]:
    """DeepSpeed's own loader, imported without touching a GPU.

    Importing DeepSpeed looks for an accelerator, and would initialise CUDA in a process that must not. The variable
    that prevents it is taken back at once: Ray's workers inherit the environment, and they do want the GPU.
    """
    given = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = given or "cpu"
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
    finally:
        if given is None:
            del os.environ["DS_ACCELERATOR"]
    return DeepSpeedConfig  # type: ignore[no-any-return]


def _not_free(key: str) -> str | None:
    for owned, remedy in OWNED_KEYS.items():
        if key == owned or key.startswith(f"{owned}.") or owned.startswith(f"{key}."):
            return f"DeepSpeed key {key} is Autotune's own: {remedy}"
    if key in TRAINING_KEYS:
        return f"DeepSpeed key {key} changes the numbers of training, not only its speed"
    return None


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
    return " ".join(str(error).split())


class _Recording(dict[str, Any]):
    """A dictionary that remembers which of its keys were asked for, its sections too."""

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__(
            {key: _Recording(value) if isinstance(value, dict) else value for key, value in document.items()}
        )
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def unread(self) -> Iterator[str]:
        """Dotted keys that nobody asked for.

        A section of which no key was asked went into a pydantic model whole, which has refused what it does not know.
        So did `zero_optimization`, although DeepSpeed looks at a few of its keys before.
        """
        for key, value in self.items():
            if key not in self._read:
                yield key
            elif isinstance(value, _Recording) and value._read and key != "zero_optimization":
                yield from (f"{key}.{inner}" for inner in value.unread())
