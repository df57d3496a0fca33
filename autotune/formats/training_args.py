"""transformers' `TrainingArguments`, as the YAML that `HfArgumentParser(TrainingArguments).parse_yaml_file` reads.

Only what a trial decides is in it; the rest (output folder, epochs, schedule, logging) is the user's to add. The
DeepSpeed settings are written out rather than named by a path, which the Trainer would look for in the working
directory: the file works wherever it is.
"""

from importlib.metadata import version
from typing import Any

from autotune.errors import UsageError
from autotune.formats.deepspeed_json import check_deepspeed, to_hf_deepspeed
from autotune.formats.foreign import Recording, asking, one_line
from autotune.spec.cluster import Device
from autotune.spec.config import Optimizer, TrialConfig
from autotune.spec.workload import Workload

_SHORT_STATES: dict[Optimizer, str] = {"adamw_8bit": "adamw_bnb_8bit", "adamw_torch_8bit": "adamw_torch_8bit"}
"""The Trainer's names."""


def to_training_args(
    config: TrialConfig, workload: Workload, device: Device, nvme_path: str | None = None
) -> dict[str, Any]:
    """The arguments of `config`, always in the same order.

    Activation checkpointing is the Trainer's own switch, which the trial used too, under FSDP2 as well: the switch of
    `fsdp_config` wraps the layers in another way, and knows only all of them or none.

    Raises:
        UsageError: see `to_deepspeed`.
        ValueError: the global batch does not divide.
    """
    document: dict[str, Any] = {
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": workload.gradient_accumulation_steps(config),
        "max_grad_norm": workload.max_gradient_norm,
        "learning_rate": workload.learning_rate,
        "weight_decay": workload.weight_decay,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        checkpointing_argument(): config.activation_checkpointing != "none",
    }
    if config.activation_checkpointing != "none":
        every = {"every_n_layers": config.selective_every} if config.selective_every else {}
        document[f"{checkpointing_argument()}_kwargs"] = {"use_reentrant": False, **every}
    if config.engine == "deepspeed":
        document["deepspeed"] = to_hf_deepspeed(config, workload, nvme_path)
    if config.optimizer in _SHORT_STATES:
        document["optim"] = _SHORT_STATES[config.optimizer]
    elif config.engine == "pytorch":  # DeepSpeed's JSON names its own
        document["optim"] = "adamw_torch_fused"
    if config.use_liger_kernel:
        document["use_liger_kernel"] = True
    if config.engine == "pytorch" and config.zero_stage:
        document["fsdp"] = True
        document["fsdp_config"] = {
            "version": 2,
            "reshard_after_forward": config.zero_stage == 3,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            # Else every rank reads the whole checkpoint into host memory. Only loading differs.
            "cpu_ram_efficient_loading": True,
            **({"cpu_offload": True} if config.offload != "none" else {}),
        }
    if device == "cpu":
        document["use_cpu"] = True
    return document


def check_training_args(document: dict[str, Any]) -> dict[str, Any]:
    """Load `document` the way the Trainer's scripts do, and refuse what transformers would silently ignore.

    Returns:
        The DeepSpeed config with every `auto` filled in, as for one rank; empty without DeepSpeed.

    Raises:
        UsageError: transformers or DeepSpeed refuses the document, or does not know a key.
    """
    sharding = Recording(document.get("fsdp_config", {}))
    # Without a GPU there is no bf16 unless the CPU is asked for, and files of a GPU study are written on any machine.
    given = {**document, "use_cpu": True} | ({"fsdp_config": sharding} if "fsdp_config" in document else {})
    with asking():
        from accelerate.state import AcceleratorState
        from transformers import HfArgumentParser, TrainingArguments

        try:
            (arguments,) = HfArgumentParser(TrainingArguments).parse_dict(given)
        except Exception as error:  # transformers and accelerate raise whatever comes to their mind
            raise UsageError(f"TrainingArguments refuses the arguments: {one_line(error)}") from error
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)  # it is a global
    for key in sharding.ignored:
        raise UsageError(f"TrainingArguments does not know the key fsdp_config.{key} and would ignore it")
    if "deepspeed" not in document:
        return {}
    filled: dict[str, Any] = arguments.hf_deepspeed_config.config
    check_deepspeed(filled)
    return filled


def checkpointing_argument() -> str:
    """The Trainer's name of it: transformers 5.23 renamed it, and earlier versions do not know the new name."""
    major, minor = version("transformers").split(".")[:2]
    return "activation_checkpointing" if (int(major), int(minor)) >= (5, 23) else "gradient_checkpointing"
