"""DeepSpeed's JSON: the one translation of a `TrialConfig`, used by the trial and by the export.

`to_deepspeed` makes every number explicit; `to_hf_deepspeed` is the same document with `auto` where the Hugging Face
Trainer has an argument of its own. Nothing here serves only a CPU run: what a CPU needs besides is an overlay of
`autotune.engines.deepspeed` and is never exported. `train_batch_size` is left out, because DeepSpeed asserts it against
a world size that does not exist where a file is checked.
"""

import functools
from collections.abc import Iterator
from typing import Any

from autotune.errors import UsageError
from autotune.formats.foreign import Recording, asking, one_line
from autotune.spec.config import ZERO_QUANTIZED, Scalar, TrialConfig
from autotune.spec.nvme import AHEAD_KEYS
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
    "zero_optimization.offload_optimizer.nvme_path": "set nvme.path",
    "zero_optimization.offload_param.nvme_path": "set nvme.path",
    "zero_optimization.cpu_offload": "use the axis offload",
    "zero_optimization.cpu_offload_params": "use the axis offload",
    **{f"zero_optimization.{key}": f"use the axis search.numerics.{key}" for key in ZERO_QUANTIZED},
    "optimizer.type": "use the axis search.numerics.optimizer",
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
    "zero_optimization.zero_quantized_nontrainable_weights",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "data_types.grad_accum_dtype",
    "communication_data_type",
    "seq_parallel_communication_data_type",
)
"""Keys that change the numbers of training, which a search for speed must not do unasked."""


def to_deepspeed(config: TrialConfig, workload: Workload, nvme_path: str | None = None) -> dict[str, Any]:
    """The DeepSpeed config of `config`, its keys always in the same order.

    Args:
        config: what runs.
        workload: the work of a step.
        nvme_path: the folder for what is offloaded to a disk; plays no part elsewhere.

    Raises:
        UsageError: `config.deepspeed` sets a key that is not free, parameters are offloaded, or states to a disk, below
            ZeRO stage 3, there is no folder for them, or matrices are shared at stage 0.
        ValueError: the global batch does not divide.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload not in ("none", "optimizer") and config.zero_stage != 3:
        raise UsageError(f"offload {config.offload} needs zero_stage 3, not {config.zero_stage}")
    if config.swaps and nvme_path is None:
        raise UsageError(f"offload {config.offload} needs a folder on a fast disk; state nvme.path")
    memory = {"device": "cpu", "pin_memory": True}
    disk = {"device": "nvme", "nvme_path": nvme_path, "pin_memory": True}
    if config.offload != "none":
        zero["offload_optimizer"] = dict(disk if config.swaps else memory)
    if config.swaps_parameters:
        zero |= {"offload_param": disk | {"max_in_cpu": 0}, **{key.partition(".")[2]: 0 for key in AHEAD_KEYS}}
    elif config.offloads_parameters:
        zero["offload_param"] = memory
    zero |= {key: True for key in ZERO_QUANTIZED if getattr(config, key)}
    document: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": workload.gradient_accumulation_steps(config),
        "gradient_clipping": workload.max_gradient_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_optimization": zero,
        **_optimizer(config, workload),
        "steps_per_print": QUIET_STEPS_PER_PRINT,
    }
    if config.tensor_parallel_size > 1:
        if config.zero_stage == 0:
            raise UsageError(f"tensor_parallel_size {config.tensor_parallel_size} needs zero_stage 1, 2 or 3, not 0")
        document["tensor_parallel"] = {"autotp_size": config.tensor_parallel_size}
    for key, value in config.deepspeed:
        if reason := _not_free(key):
            raise UsageError(reason)
        set_dotted(document, key, value)
    return document


def _optimizer(config: TrialConfig, workload: Workload) -> dict[str, Any]:
    """DeepSpeed's own AdamW; one that it does not have is made by who calls it, and has to be allowed."""
    if config.optimizer != "adamw":
        return {"zero_allow_untested_optimizer": True}
    params = {"lr": workload.learning_rate, "weight_decay": workload.weight_decay}
    return {"optimizer": {"type": "AdamW", "params": params}}


TRAINER_KEYS = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
    "optimizer.params.betas",
    "optimizer.params.eps",
)
"""Keys for which the Trainer has an argument. It fills in `auto`, and refuses a number that is not its argument's."""


def to_hf_deepspeed(config: TrialConfig, workload: Workload, nvme_path: str | None = None) -> dict[str, Any]:
    """`to_deepspeed`, leaving to the Trainer's arguments what they decide.

    Bucket sizes are no such thing: `auto` would have the Trainer put numbers there that no trial measured.

    Raises:
        UsageError: see `to_deepspeed`.
        ValueError: the global batch does not divide.
    """
    document = to_deepspeed(config, workload, nvme_path)
    for key in TRAINER_KEYS:
        if key.partition(".")[0] in document:
            set_dotted(document, key, "auto")
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
    typo at the top level, or `activation_checkpointing.enabled`, changes nothing and says nothing.

    Raises:
        UsageError: DeepSpeed refuses the document or does not know a key.
    """
    recording = Recording(document)
    with asking():
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            DeepSpeedConfig(recording)
        except Exception as error:  # DeepSpeed raises asserts, ValueErrors, pydantic's and its own
            raise UsageError(f"DeepSpeed refuses the config: {one_line(error)}") from error
    for key in _ignored(recording):
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


@functools.cache
def async_io_error() -> str | None:
    """Why DeepSpeed cannot build the op that reads and writes disks on this machine; None if it can."""
    with asking():
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if AsyncIOBuilder().is_compatible():
            return None
    return "DeepSpeed's op async_io needs libaio and its headers, which were not found: apt-get install libaio-dev"


def _not_free(key: str) -> str | None:
    for owned, remedy in OWNED_KEYS.items():
        if key == owned or key.startswith(f"{owned}.") or owned.startswith(f"{key}."):
            return f"DeepSpeed key {key} is Autotune's own: {remedy}"
    if key in TRAINING_KEYS:
        return f"DeepSpeed key {key} changes the numbers of training, not only its speed"
    return None


def _ignored(recording: Recording) -> Iterator[str]:
    """Dotted keys that DeepSpeed did not ask for.

    A section of which no key was asked went into a pydantic model whole, which has refused what it does not know. So
    did `zero_optimization`, although DeepSpeed looks at a few of its keys before.
    """
    yield from recording.ignored
    for key in recording.given:
        section = dict.__getitem__(recording, key)
        if isinstance(section, Recording) and section.asked and key != "zero_optimization":
            yield from (f"{key}.{inner}" for inner in _ignored(section))
