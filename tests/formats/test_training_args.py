"""The real transformers accepts the arguments, and DeepSpeed's settings come out of them as they were measured."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from transformers import HfArgumentParser, TrainingArguments

from autotune.errors import UsageError
from autotune.formats.deepspeed_json import to_deepspeed
from autotune.formats.training_args import check_training_args, to_training_args
from autotune.spec.config import TrialConfig
from tests.formats.samples import WORKLOAD, any_config, config


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@given(any_config())
@settings(deadline=None, max_examples=60)
def test_transformers_accepts_every_config_and_fills_in_what_was_measured(config: TrialConfig) -> None:
    filled = check_training_args(to_training_args(config, WORKLOAD, "cuda"))
    if config.engine == "pytorch":
        assert filled == {}
        return
    # What the Trainer and accelerate add of their own: AdamW's defaults, and their way to keep DeepSpeed quiet.
    assert filled["optimizer"]["params"].pop("betas") == [0.9, 0.999]
    assert filled["optimizer"]["params"].pop("eps") == 1e-8
    assert filled.pop("steps_per_print") == float("inf")
    measured = to_deepspeed(config, WORKLOAD)
    del measured["steps_per_print"]
    assert filled == measured


@given(any_config())
@settings(deadline=None, max_examples=30)
def test_the_file_gives_the_arguments_of_the_trial(
    tmp_path_factory: pytest.TempPathFactory, config: TrialConfig
) -> None:
    file = tmp_path_factory.mktemp("arguments") / "training_args.yaml"
    file.write_text(yaml.safe_dump(to_training_args(config, WORKLOAD, "cpu"), sort_keys=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # no name that is about to go
        (arguments,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(file))
    assert arguments.use_cpu
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * config.gpus == 1024
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (2e-5, 0.1, 0.5)
    assert (arguments.bf16, arguments.fp16) == (config.precision == "bf16", config.precision == "fp16")
    assert arguments.activation_checkpointing == (config.activation_checkpointing != "none")
    assert (arguments.activation_checkpointing_kwargs or {}).get("every_n_layers") == config.selective_every
    if config.engine == "pytorch" and config.zero_stage:
        plugin = arguments.fsdp_plugin_args
        assert (plugin["fsdp_version"], plugin["reshard_after_forward"]) == (2, config.zero_stage == 3)
        assert plugin.get("cpu_offload", False) == (config.offload != "none")
    else:
        assert not arguments.fsdp


@pytest.mark.parametrize(
    ("engine", "change", "message"),
    [
        ("deepspeed", {"learning_rat": 1.0}, "learning_rat"),
        ("deepspeed", {"lr_scheduler_type": "steep"}, "not a valid SchedulerType"),
        (
            "deepspeed",
            {"deepspeed": {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {}, "gradient_cliping": 1}},
            "does not know the key gradient_cliping",
        ),
        ("pytorch", {"fsdp_config": {"version": 2, "reshard": True}}, r"does not know the key fsdp_config\.reshard"),
        ("pytorch", {"fsdp_config": {"version": 2, "auto_wrap_policy": "ALL"}}, "auto_wrap_policy|ALL"),
    ],
)
def test_what_transformers_would_ignore_or_refuse_is_one_sentence(
    engine: str, change: dict[str, Any], message: str
) -> None:
    document = to_training_args(config(engine=engine, zero_stage=3), WORKLOAD, "cuda")
    with pytest.raises(UsageError, match=message) as caught:
        check_training_args({**document, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("engine", "stage"), [("pytorch", 0), ("deepspeed", 2)])
def test_the_trainer_makes_the_optimizer_that_deepspeed_does_not_have(engine: str, stage: int) -> None:
    short = config(engine=engine, zero_stage=stage, optimizer="adamw_8bit")
    document = to_training_args(short, WORKLOAD, "cuda")
    assert document["optim"] == "adamw_bnb_8bit"
    filled = check_training_args(document)
    assert "optimizer" not in filled
    assert filled.get("zero_allow_untested_optimizer", False) == (engine == "deepspeed")


def test_torchaos_optimizer_has_the_trainers_own_name() -> None:
    document = to_training_args(config(engine="pytorch", zero_stage=3, optimizer="adamw_torch_8bit"), WORKLOAD, "cuda")
    assert document["optim"] == "adamw_torch_8bit"
    assert check_training_args(document) == {}


def test_checking_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for engine in ("deepspeed", "pytorch"):
        document = to_training_args(config(engine=engine, zero_stage=3), WORKLOAD, "cuda")
        kept = yaml.safe_dump(document)
        check_training_args(document)
        assert yaml.safe_dump(document) == kept
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("installed", "name"), [("5.16.1", "gradient_checkpointing"), ("5.23.0", "activation_checkpointing")]
)
def test_checkpointing_has_the_name_that_transformers_knows(
    monkeypatch: pytest.MonkeyPatch, installed: str, name: str
) -> None:
    monkeypatch.setattr("autotune.formats.training_args.version", lambda _: installed)
    document = to_training_args(config(activation_checkpointing="full"), WORKLOAD, "cuda")
    assert document[name] is True
    assert document[f"{name}_kwargs"] == {"use_reentrant": False}
