"""The config file is accepted by the real accelerate, and `accelerate launch` makes of it what was measured."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, DynamoBackend, FullyShardedDataParallelPlugin, TorchDynamoPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from hypothesis import given, settings
from torch.distributed.fsdp import CPUOffloadPolicy

from autotune.errors import UsageError
from autotune.formats.accelerate_yaml import check_accelerate, parallelism_environment, to_accelerate
from autotune.formats.deepspeed_json import to_deepspeed
from autotune.spec.config import TrialConfig
from tests.formats.samples import WORKLOAD, any_config, config


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def launch(folder: Path, document: dict[str, Any]) -> Any:
    """The arguments that `accelerate launch --config_file` makes of the file."""
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    command = ["--config_file", str(file), "--main_process_port", "0", "train.py"]
    arguments, defaults, from_file = _validate_launch_command(launch_command_parser().parse_args(command))
    # As `launch_command` does: from here DeepSpeed's plugin knows what could contradict its file.
    fields = list(defaults.deepspeed_config) + ["mixed_precision"] * from_file
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
    return arguments


@given(any_config())
@settings(deadline=None, max_examples=40)
def test_accelerate_accepts_every_config(tmp_path_factory: pytest.TempPathFactory, config: TrialConfig) -> None:
    document = to_accelerate(config, 2 if config.gpus == 16 else 1, "cuda")
    check_accelerate(document)
    file = tmp_path_factory.mktemp("config") / "accelerate.yaml"
    file.write_text(yaml.safe_dump(document))
    loaded = load_config_from_file(str(file))
    assert (loaded.num_machines, loaded.num_processes) == (document["num_machines"], config.gpus)
    assert not loaded.use_cpu


def test_layers_are_compiled_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = to_accelerate(config(engine="pytorch", zero_stage=3, torch_compile=True), 1, "cuda")
    check_accelerate(document)
    for name, value in prepare_multi_gpu_env(launch(tmp_path, document)).items():
        if name.startswith("ACCELERATE_DYNAMO_"):
            monkeypatch.setenv(name, value)
    plugin = TorchDynamoPlugin()
    assert plugin.backend == DynamoBackend.INDUCTOR
    assert plugin.use_regional_compilation
    assert (plugin.mode, plugin.fullgraph, plugin.dynamic) == ("default", False, False)


def test_ranks_share_sequences_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = config(zero_stage=3, sequence_parallel_size=4, attention="flash_attention_2")
    document = to_accelerate(trial, 1, "cuda")
    check_accelerate(document)
    environment = prepare_deepspeed_cmd_env(launch(tmp_path, document))[1]
    # What launch.sh says to ranks that torchrun starts is what accelerate's own launcher says to them.
    assert parallelism_environment(trial).items() <= environment.items()
    for name, value in environment.items():
        if "PARALLELISM" in name:
            monkeypatch.setenv(name, value)
    found = ParallelismConfig()
    assert (found.sp_size, found.sp_backend, found.data_parallel_size) == (4, "deepspeed", 2)
    assert found.sp_handler.sp_attn_implementation == "flash_attention_2"
    assert found.sp_handler.sp_seq_length_is_variable


@pytest.mark.parametrize("stage", [2, 3])
def test_fsdp2_is_launched_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    arguments = launch(tmp_path, to_accelerate(config(engine="pytorch", zero_stage=stage), 1, "cuda"))
    assert arguments.use_fsdp
    environment = prepare_multi_gpu_env(arguments)
    assert arguments.nproc_per_node == "8"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", environment["FSDP_CPU_RAM_EFFICIENT_LOADING"])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is (stage == 3)
    assert plugin.auto_wrap_policy is not None
    assert not plugin.activation_checkpointing  # the script's
    assert plugin.cpu_ram_efficient_loading
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_offload_and_groups_are_launched_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = config(
        engine="pytorch", zero_stage=3, gpus=16, data_parallel_replicate_size=2, offload="optimizer+parameters"
    )
    document = to_accelerate(trial, 2, "cuda")
    check_accelerate(document)
    arguments = launch(tmp_path, document)
    arguments.machine_rank, arguments.main_process_ip = 0, "127.0.0.1"
    environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    parallelism = ParallelismConfig()
    assert parallelism.total_size == 16
    assert (parallelism.dp_replicate_size, parallelism.dp_shard_size) == (2, 8)
    assert parallelism.fsdp_dim_names == ["dp_replicate", "dp_shard_cp"]
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", environment["FSDP_CPU_RAM_EFFICIENT_LOADING"])
    assert isinstance(FullyShardedDataParallelPlugin().cpu_offload, CPUOffloadPolicy)
    with pytest.raises(UsageError, match=r"does not know the key parallelism_config\.dp_shard_size"):
        check_accelerate({**document, "parallelism_config": {"dp_shard_size": 8}})


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("nodes", [1, 2])
def test_deepspeed_is_launched_with_the_explicit_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, nodes: int
) -> None:
    monkeypatch.chdir(tmp_path)
    trial = config(zero_stage=stage, activation_checkpointing="full")
    measured = to_deepspeed(trial, WORKLOAD)
    Path("ds_config.json").write_text(json.dumps(measured))
    arguments = launch(tmp_path, to_accelerate(trial, nodes, "cuda"))
    arguments.machine_rank, arguments.main_process_ip = 0, "127.0.0.1"
    assert arguments.use_deepspeed
    command, environment = prepare_deepspeed_cmd_env(arguments)
    assert command is None  # torchrun on each node, not pdsh over ssh
    assert arguments.nproc_per_node == str(8 // nodes)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage
    assert plugin.zero3_init_flag is (stage == 3)
    assert {**plugin.deepspeed_config, "steps_per_print": measured["steps_per_print"]} == measured


@pytest.mark.parametrize(("gpus", "kind"), [(1, "NO"), (8, "MULTI_GPU")])
def test_ddp(tmp_path: Path, gpus: int, kind: str) -> None:
    document = to_accelerate(config(engine="pytorch", zero_stage=0, gpus=gpus, precision="fp32"), 1, "cuda")
    arguments = launch(tmp_path, document)
    assert document["distributed_type"] == kind
    assert arguments.multi_gpu is (gpus > 1)
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (False, False)
    assert arguments.mixed_precision == "no"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_procesess": 8}, "num_procesess"),
        ({"distributed_type": "FSDP2"}, "refuses the config"),
        (
            {"fsdp_config": {"fsdp_version": 2, "fsdp_reshard": True}},
            r"does not know the key fsdp_config\.fsdp_reshard",
        ),
        ({"deepspeed_config": {"deepspeed_config_fil": "x"}}, r"does not know the key deepspeed_config\.deepspeed_"),
    ],
)
def test_what_accelerate_would_ignore_or_refuse_is_one_sentence(change: dict[str, Any], message: str) -> None:
    before = dict(os.environ)
    document = to_accelerate(config(engine="pytorch", zero_stage=3), 1, "cuda")
    with pytest.raises(UsageError, match=message) as caught:
        check_accelerate({**document, **change})
    assert "\n" not in str(caught.value)
    assert dict(os.environ) == before
