"""`FORMATS`: the files of other tools that a trial's config can become, and how each is written."""

import ast
import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from autotune.errors import UsageError
from autotune.export.text import TEMPLATES, as_json, as_yaml
from autotune.formats import script as script_format
from autotune.formats.accelerate_yaml import DEEPSPEED_FILE, check_accelerate, to_accelerate
from autotune.formats.bitsandbytes_json import check_quantization_config, to_quantization_config
from autotune.formats.deepspeed_json import check_deepspeed, to_deepspeed, to_hf_deepspeed
from autotune.formats.peft_json import ADAPTER_FILE, check_adapter_config, to_adapter_config
from autotune.formats.targets import Target, cannot_express, no_target
from autotune.formats.training_args import check_training_args, to_training_args
from autotune.results import Best
from autotune.space.space import Space
from autotune.spec.config import Method, TrialConfig
from autotune.spec.script import ScriptRun
from autotune.study import Study


def nodes_of(config: TrialConfig, space: Space) -> int:
    """How many nodes the ranks of a config fill."""
    return -(-config.gpus // space.cluster.gpus_per_node)


def _heading(study: Study, source: Best) -> str:
    """Comments above a YAML file: what it is from, and for how many ranks it keeps the global batch."""
    config, workload = source.config, study.space.workload
    return (
        f"# Study {study.space.name}, trial {source.trial}: {config.describe()}.\n"
        f"# Global batch {workload.global_batch_size} = {config.data_parallel_size} ranks x {config.micro_batch_size}"
        f" x {workload.gradient_accumulation_steps(config)} steps. How to use it: README.md\n"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A foreign file that a trial's config can become."""

    file: str
    explanation: str
    targets: tuple[Target, ...]
    """Who reads it, the first directly: all of them must be able to express the config. None: the user's own script, or
    one that another file describes."""
    write: Callable[[Study, Best], str]
    """The file's text, accepted by the library that reads it."""
    launch: Literal["", "trainer", "accelerate", "deepspeed"] = ""
    """How launch.sh calls a start with this file."""
    audience: str = ""
    """Which scripts are started so."""
    describes: tuple[Method, ...] = ()
    """The methods whose trials alone have what it describes; empty where all do."""
    fallback: bool = False
    """Written to the best folder only where no other target of the study can run the winner."""

    def refusal(self, config: TrialConfig, space: Space) -> str | None:
        """Why the file cannot express `config`, or None when it can."""
        if self.describes and config.method not in self.describes:
            return f"it describes method {' or '.join(self.describes)}, not {config.method}"
        reasons = (cannot_express(target, config, space.cluster.device) for target in self.targets)
        return next((reason for reason in reasons if reason is not None), None)

    def wanted(self, study: Study, best: Best) -> bool:
        """Whether the best folder has a place for the file."""
        if study.space.script is not None:
            return self.file in _script_files(study.space.script)
        if self.describes:
            return self.refusal(best.config, study.space) is None
        if not self.targets:
            return False
        others = [target for target in study.space.file.targets if target not in self.targets]
        return not self.fallback or no_target(tuple(others), best.config) is not None

    def source(self, study: Study, wanted: Best) -> Best | None:
        """The trial that is wanted; where it cannot be expressed and is the winner, the fastest one that can.

        None when there is none.
        """
        if self.refusal(wanted.config, study.space) is None:
            return wanted
        if wanted != study.best():
            return None
        return study.best_among(result for result in study.results if self.refusal(result.config, study.space) is None)


def _arguments(study: Study, source: Best) -> dict[str, Any]:
    space = study.space
    return to_training_args(source.config, space.workload, space.cluster.device, space.cluster.nvme_path)


def _training_args(study: Study, source: Best) -> str:
    document = _arguments(study, source)
    check_training_args(document)
    return _heading(study, source) + as_yaml(document)


def _hf_deepspeed(study: Study, source: Best) -> str:
    # Its `auto`s mean nothing without the arguments: checking those checks it, filled in.
    check_training_args(_arguments(study, source))
    return as_json(to_hf_deepspeed(source.config, study.space.workload, study.space.cluster.nvme_path))


def _deepspeed(study: Study, source: Best) -> str:
    document = to_deepspeed(source.config, study.space.workload, study.space.cluster.nvme_path)
    check_deepspeed(document)
    return as_json(document)


def _accelerate(study: Study, source: Best) -> str:
    space = study.space
    document = to_accelerate(source.config, nodes_of(source.config, space), space.cluster.device)
    check_accelerate(document)
    return _heading(study, source) + as_yaml(document)


def _adapter_config(study: Study, source: Best) -> str:
    document = to_adapter_config(source.config)
    check_adapter_config(document)
    return as_json(document)


def _quantization_config(study: Study, source: Best) -> str:
    document = to_quantization_config(source.config)
    check_quantization_config(document)
    return as_json(document)


def _train_script(study: Study, source: Best) -> str:
    space, config, workload = study.space, source.config, study.space.workload
    nodes = nodes_of(config, space)
    needed = {
        "adamw-8bit": config.optimizer == "adamw_8bit",
        "adamw-torch-8bit": config.optimizer == "adamw_torch_8bit",
        "liger": config.use_liger_kernel,
        "fp8": config.fp8,
    }
    extras = [name for name, is_needed in needed.items() if is_needed]
    text = TEMPLATES.get_template("train.py.j2").render(
        study=space.name,
        trial=source.trial,
        describe=config.describe(),
        method=config.method,
        extras=f"[{','.join(extras)}]" if extras else "",
        model=space.model.name,
        nodes=nodes,
        ranks_per_node=config.ranks // nodes,
        config=_literal(config.to_dict()),
        workload=_literal(dataclasses.asdict(workload)),
        sequence_length=config.sequence_length,
    )
    ast.parse(text)
    return text


def _script_files(script: ScriptRun) -> set[str]:
    """Names of the files that start the winner of a user's own script."""
    named = script_format.names([*script.command, *(value for _, value in script.environment)])
    return {"launch.sh", *(file.name for name, file in script_format.FILES.items() if name in named)}


def _script_launch(study: Study, source: Best) -> str:
    space, config, script = study.space, source.config, study.space.script
    if script is None:
        raise UsageError(f"study {space.name!r} ran no script; use another format")
    nodes = nodes_of(config, space)
    places = {
        "nodes": str(nodes),
        "node_rank": '"$NODE_RANK"' if nodes > 1 else "0",
        "gpus_per_node": str(config.gpus // nodes),
        "master_address": '"$MASTER_ADDR"' if nodes > 1 else "127.0.0.1",
        "master_port": '"${MASTER_PORT:-29500}"',
        "model": shlex.quote(script.model),
        "output": '"${OUTPUT:-output}"',
    }
    quoted = {name: shlex.quote(value) for name, value in script_format.values(config, space.workload).items()}
    expressions = quoted | places | {name: f'"$here"/{file.name}' for name, file in script_format.FILES.items()}
    return TEMPLATES.get_template("launch_script.sh.j2").render(
        study=space.name,
        trial=source.trial,
        describe=config.describe(),
        nodes=nodes,
        ranks_per_node=config.ranks // nodes,
        launch=script.launch,
        variables=[(name, script_format.fill_for_shell(value, expressions)) for name, value in script.environment],
        words=[script_format.fill_for_shell(word, expressions) for word in script.command],
    )


def _literal(fields: dict[str, Any]) -> str:
    """A dictionary as Python source, one key a line."""
    lines = "".join(f"        {key!r}: {value!r},\n" for key, value in fields.items())
    return "{\n" + lines.replace("'", '"') + "    }"


FORMATS = {
    "training-args": Format(
        file="training_args.yaml",
        explanation="`TrainingArguments` of transformers' Trainer, DeepSpeed's settings included",
        targets=("hf_trainer",),
        write=_training_args,
        launch="trainer",
        audience="a script on transformers' Trainer that reads its TrainingArguments from a YAML file",
    ),
    "deepspeed-hf": Format(
        file="ds_config.hf.json",
        explanation="DeepSpeed configuration for the Trainer's `--deepspeed`; its `auto`s are the other arguments",
        targets=("hf_trainer", "deepspeed"),
        write=_hf_deepspeed,
    ),
    "deepspeed": Format(
        file=DEEPSPEED_FILE,
        explanation="DeepSpeed configuration with every number, for `deepspeed.initialize` and `accelerate launch`",
        targets=("deepspeed",),
        write=_deepspeed,
        launch="deepspeed",
        audience="a script that calls deepspeed.initialize with the arguments of deepspeed.add_config_arguments",
    ),
    "accelerate": Format(
        file="accelerate.yaml",
        explanation="configuration of `accelerate launch`",
        targets=("accelerate",),
        write=_accelerate,
        launch="accelerate",
        audience="a script on accelerate's Accelerator",
    ),
    "adapter": Format(
        file=ADAPTER_FILE,
        explanation="the adapters, for `peft.LoraConfig.from_pretrained` on this folder",
        targets=(),
        write=_adapter_config,
        describes=("lora", "qlora"),
    ),
    "quantization": Format(
        file="quantization_config.json",
        explanation="how the frozen weights are quantised: the arguments of transformers' `BitsAndBytesConfig`",
        targets=(),
        write=_quantization_config,
        describes=("qlora",),
    ),
    "train-script": Format(
        file="train.py",
        explanation="a training script to edit: your text or tokens, on the engine that the trial ran",
        targets=("autotune",),
        write=_train_script,
        fallback=True,
    ),
    "script": Format(
        file="launch.sh",
        explanation="runs your script as the trial did, on the measured number of ranks, with the whole global batch",
        targets=(),
        write=_script_launch,
    ),
}
"""By the names that `autotune export --format` takes, besides `best`."""
