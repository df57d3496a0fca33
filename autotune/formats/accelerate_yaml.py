"""accelerate's config file, as `accelerate launch --config_file` reads it: DeepSpeed, FSDP2 or plain DDP.

It says how many processes run and how they share the model. The batch, the clipping and activation checkpointing are
the script's: see `autotune.formats.targets`.
"""

import tempfile
from pathlib import Path
from typing import Any

import yaml

from autotune.errors import UsageError
from autotune.formats.foreign import asking, one_line
from autotune.spec.cluster import Device
from autotune.spec.config import TrialConfig

DEEPSPEED_FILE = "ds_config.json"
"""Named in the DeepSpeed flavour. accelerate looks for it in the working directory, or where `--deepspeed_config_file`
says. It is the explicit one: only the Trainer knows what `auto` stands for."""


def to_accelerate(config: TrialConfig, nodes: int, device: Device) -> dict[str, Any]:
    """The config file of `config` on `nodes` nodes, its keys always in the same order."""
    document: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(config),
        "num_machines": nodes,
        "num_processes": config.ranks,
    }
    if config.engine == "deepspeed":
        # Nothing else may stand beside the file: accelerate refuses what could contradict it.
        document["deepspeed_config"] = {
            "deepspeed_config_file": DEEPSPEED_FILE,
            "zero3_init_flag": config.zero_stage == 3,
        }
        if nodes > 1:
            document["deepspeed_config"]["deepspeed_multinode_launcher"] = "standard"  # one command a node, without ssh
    else:
        document["mixed_precision"] = "no" if config.precision == "fp32" else config.precision
    if document["distributed_type"] == "FSDP":
        document["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": config.zero_stage == 3,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            # As in training_args.yaml: were it said in one of them only, ranks would start with different weights.
            "fsdp_cpu_ram_efficient_loading": True,
            **({"fsdp_offload_params": True} if config.offload != "none" else {}),
        }
    if parallelism := _parallelism(config):
        document["parallelism_config"] = parallelism
    if config.torch_compile:
        document["dynamo_config"] = {
            "dynamo_backend": "INDUCTOR",
            "dynamo_mode": "default",
            "dynamo_use_dynamic": False,
            "dynamo_use_fullgraph": False,
            "dynamo_use_regional_compilation": True,
        }
    if device == "cpu":
        document["use_cpu"] = True
    return document


def parallelism_environment(config: TrialConfig) -> dict[str, str]:
    """What `accelerate launch` makes of the file's `parallelism_config`, for ranks that something else starts.

    Empty where the config needs none.
    """
    found = {key.upper(): str(value) for key, value in _parallelism(config).items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", **found} if found else {}


def _parallelism(config: TrialConfig) -> dict[str, Any]:
    """How ranks are divided, beyond what the kind of distribution says."""
    if config.data_parallel_replicate_size > 1:
        return {
            "parallelism_config_dp_replicate_size": config.data_parallel_replicate_size,
            "parallelism_config_dp_shard_size": config.shards,
        }
    if config.sequence_parallel_size > 1:
        return {
            "parallelism_config_dp_shard_size": config.data_parallel_size,
            "parallelism_config_sp_size": config.sequence_parallel_size,
            "parallelism_config_sp_backend": "deepspeed",
            "parallelism_config_sp_attn_implementation": config.attention,
        }
    return {}


def check_accelerate(document: dict[str, Any]) -> None:
    """Load `document` the way accelerate does, and refuse what accelerate would silently ignore.

    accelerate refuses unknown keys at the top level. It turns those of a section into arguments of `accelerate launch`,
    known or not.

    Raises:
        UsageError: accelerate refuses the document or does not know a key.
    """
    with asking(), tempfile.TemporaryDirectory() as folder:
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        file = Path(folder) / "accelerate.yaml"
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        try:
            load_config_from_file(str(file))
        except Exception as error:  # ValueErrors, KeyErrors of enums, TypeErrors of dataclasses
            raise UsageError(f"accelerate refuses the config: {one_line(error)}") from error
        arguments = vars(launch_command_parser().parse_args(["train.py"]))
    for section in ("deepspeed_config", "fsdp_config", "parallelism_config", "dynamo_config"):
        for key in document.get(section, {}):
            if key not in arguments:
                raise UsageError(f"accelerate does not know the key {section}.{key} and would ignore it")


def _distributed_type(config: TrialConfig) -> str:
    if config.engine == "deepspeed":
        return "DEEPSPEED"
    if config.zero_stage:
        return "FSDP"
    return "MULTI_GPU" if config.ranks > 1 else "NO"
