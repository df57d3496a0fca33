"""The best folder: files that the engineer's own tools take, each made from a trial that was measured.

Every file is written by the translation that the trial itself used (`autotune.formats`) and checked by the library that
will read it. A file whose format cannot express the overall winner is made from the fastest trial that it can express,
and says which trial that is.
"""

import ast
import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from autotune import __version__
from autotune.confirmation import ROUNDS
from autotune.errors import NothingFeasibleError, UsageError
from autotune.formats import script as script_format
from autotune.formats.accelerate_yaml import DEEPSPEED_FILE, check_accelerate, to_accelerate
from autotune.formats.bitsandbytes_json import check_quantization_config, to_quantization_config
from autotune.formats.deepspeed_json import check_deepspeed, to_deepspeed, to_hf_deepspeed
from autotune.formats.peft_json import ADAPTER_FILE, check_adapter_config, to_adapter_config
from autotune.formats.targets import Target, cannot_express, left_to_script, no_target
from autotune.formats.training_args import check_training_args, to_training_args
from autotune.results import Best
from autotune.space.space import Space
from autotune.spec.config import Method, TrialConfig
from autotune.spec.outcome import Measurement
from autotune.spec.script import ScriptRun
from autotune.study import Study
from autotune.units import format_bytes, format_rate, format_seconds

FORMAT = "autotune-best/1"

_TEMPLATES = Environment(
    loader=PackageLoader("autotune", "formats/templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # shell and Markdown, not HTML
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


def _training_args(study: Study, source: Best) -> str:
    document = to_training_args(source.config, study.space.workload, study.space.cluster.device)
    check_training_args(document)
    return _heading(study, source) + _yaml(document)


def _hf_deepspeed(study: Study, source: Best) -> str:
    # Its `auto`s mean nothing without the arguments: checking those checks it, filled in.
    check_training_args(to_training_args(source.config, study.space.workload, study.space.cluster.device))
    return _json(to_hf_deepspeed(source.config, study.space.workload))


def _deepspeed(study: Study, source: Best) -> str:
    document = to_deepspeed(source.config, study.space.workload)
    check_deepspeed(document)
    return _json(document)


def _accelerate(study: Study, source: Best) -> str:
    space = study.space
    document = to_accelerate(source.config, _nodes(source.config, space), space.cluster.device)
    check_accelerate(document)
    return _heading(study, source) + _yaml(document)


def _adapter_config(study: Study, source: Best) -> str:
    document = to_adapter_config(source.config)
    check_adapter_config(document)
    return _json(document)


def _quantization_config(study: Study, source: Best) -> str:
    document = to_quantization_config(source.config)
    check_quantization_config(document)
    return _json(document)


def _train_script(study: Study, source: Best) -> str:
    space, config, workload = study.space, source.config, study.space.workload
    nodes = _nodes(config, space)
    text = _TEMPLATES.get_template("train.py.j2").render(
        study=space.name,
        trial=source.trial,
        describe=config.describe(),
        method=config.method,
        optimizer=config.optimizer,
        model=space.model.name,
        nodes=nodes,
        ranks_per_node=config.gpus // nodes,
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
    nodes = _nodes(config, space)
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
    return _TEMPLATES.get_template("launch_script.sh.j2").render(
        study=space.name,
        trial=source.trial,
        describe=config.describe(),
        nodes=nodes,
        ranks_per_node=config.gpus // nodes,
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


def export_best(study: Study, out: Path) -> dict[str, Path]:
    """Write `out/best/` anew.

    The folder appears whole or not at all: files are written beside it and moved in place.

    Returns:
        File name to absolute path; empty when no trial is eligible.

    Raises:
        UsageError: the folder cannot be written.
    """
    best = study.best()
    if best is None:
        return {}
    documents, target = _documents(study, best), (out / "best").absolute()
    _write_folder(target, documents)
    return {name: target / name for name in documents}


def export_pareto(study: Study, out: Path) -> dict[str, Path]:
    """Write `out/pareto/` anew: `trial-N/` with the best files of each trial of the Pareto front, and `pareto.json`.

    A file that cannot express a trial is not in its folder; the README there says why.

    Returns:
        File name, relative to `out/pareto/`, to absolute path; empty when no trial is eligible.

    Raises:
        UsageError: the folder cannot be written.
    """
    front = study.pareto_front
    if not front:
        return {}
    documents = {f"trial-{best.trial}/{name}": text for best in front for name, text in _documents(study, best).items()}
    points = [{"trial": best.trial, "folder": f"trial-{best.trial}", **figures(best.measurement)} for best in front]
    documents["pareto.json"] = _json({"study": study.space.name, "points": points})
    target = (out / "pareto").absolute()
    _write_folder(target, documents)
    return {name: target / name for name in documents}


def _write_folder(target: Path, documents: dict[str, str]) -> None:
    """The folder with these files and no others; it appears whole or not at all."""
    fresh = target.with_name(f".{target.name}.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        for name, text in documents.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_text(text, encoding="utf-8")
        for script in fresh.rglob("*.sh"):
            script.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror}); name a writable folder with --out") from None


def export_files(study: Study, fmt: str) -> dict[str, str]:
    """The winner in one format, and what that file needs beside it.

    Args:
        study: may be one that is only read.
        fmt: `best` or a key of `FORMATS`.

    Returns:
        File name to text.

    Raises:
        UsageError: there is no such format, or it cannot express the winner.
        NothingFeasibleError: no trial is eligible.
    """
    if fmt != "best" and fmt not in FORMATS:
        raise UsageError(f"format {fmt!r} does not exist; use one of {', '.join(['best', *FORMATS])}")
    name, best = study.space.name, study.best()
    if best is None:
        raise NothingFeasibleError(f"study {name!r} has no eligible trial among its {len(study.results)} finished ones")
    if fmt == "best":
        return {"best.yaml": _yaml(_best_document(study, best))}
    chosen = FORMATS[fmt]
    reason = chosen.refusal(best.config, study.space)
    if reason is not None:
        raise UsageError(
            f"format {fmt} cannot express trial {best.trial}, the winner of study {name!r}: {reason};"
            " use another format, or list that target alone under `targets` in the search space"
        )
    files = {chosen.file: chosen.write(study, best)}
    if fmt == "accelerate" and best.config.engine == "deepspeed":
        files[DEEPSPEED_FILE] = FORMATS["deepspeed"].write(study, best)
    return files


def _documents(study: Study, best: Best) -> dict[str, str]:
    """The best files of one trial, by name."""
    space = study.space
    found = [(form, form.source(study, best)) for form in FORMATS.values() if form.wanted(study, best)]
    sources = [(form, source) for form, source in found if source is not None]
    own = space.script is not None
    modes = [_mode(form, source, space) for form, source in sources if form.launch and not own]
    documents = {"best.yaml": _yaml(_best_document(study, best))}
    documents |= {form.file: form.write(study, source) for form, source in sources}
    if modes:
        documents["launch.sh"] = _TEMPLATES.get_template("launch.sh.j2").render(study=space.name, modes=modes)
    trials = {"best.yaml": best} | {form.file: source for form, source in sources}
    documents["provenance.json"] = _json(_provenance(study, trials))
    documents["README.md"] = _TEMPLATES.get_template("best_readme.md.j2").render(
        study=space.name,
        model=space.model.name,
        cluster=space.cluster.describe(),
        best=best,
        files=[
            {
                "name": form.file,
                "source": source,
                "explanation": form.explanation,
                "reason": form.refusal(best.config, space),
                "left_to_script": [] if own else _left_to_script(form, source.config, space),
            }
            for form, source in sources
        ],
        missing=[
            {"name": form.file, "reason": form.refusal(best.config, space)} for form, source in found if source is None
        ],
        modes=modes,
        own_script=own,
        baseline=study.baseline_outcome if isinstance(study.baseline_outcome, Measurement) else None,
        verdict=study.verdict if best == study.best() else None,
        numerics={axis: space.values(best.config)[axis] for axis in space.numerics},
        is_winner=best == study.best(),
        rounds=ROUNDS,
        format_bytes=format_bytes,
        format_rate=format_rate,
        format_seconds=format_seconds,
    )
    return documents


def _mode(form: Format, source: Best, space: Space) -> dict[str, Any]:
    """What launch.sh and the README say of one way to start a script."""
    nodes = _nodes(source.config, space)
    ranks_per_node = source.config.gpus // nodes
    torchrun = f"torchrun {'--standalone' if nodes == 1 else f'--nnodes {nodes} …'} --nproc-per-node {ranks_per_node}"
    by_hand = {
        "trainer": f"{torchrun} train.py {form.file}",
        "accelerate": f"accelerate launch --config_file {form.file}{' …' if nodes > 1 else ''} train.py",
        "deepspeed": f"{torchrun} train.py --deepspeed --deepspeed_config {form.file}",
    }
    return {
        "name": form.launch,
        "audience": form.audience,
        "by_hand": by_hand[form.launch],
        "trial": source.trial,
        "describe": source.config.describe(),
        "engine": source.config.engine,
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
    }


def _left_to_script(form: Format, config: TrialConfig, space: Space) -> list[str]:
    if not form.targets:
        return []
    todo = left_to_script(form.targets[0], config, space.workload)
    if form is FORMATS["deepspeed-hf"]:
        arguments = to_training_args(config, space.workload, space.cluster.device)
        del arguments["deepspeed"]
        todo.append(f"has the arguments `{', '.join(f'{name}={value!r}' for name, value in arguments.items())}`")
    return todo


def _nodes(config: TrialConfig, space: Space) -> int:
    return -(-config.gpus // space.cluster.gpus_per_node)


def _heading(study: Study, source: Best) -> str:
    """Comments above a YAML file: what it is from, and for how many ranks it keeps the global batch."""
    config, workload = source.config, study.space.workload
    return (
        f"# Study {study.space.name}, trial {source.trial}: {config.describe()}.\n"
        f"# Global batch {workload.global_batch_size} = {config.data_parallel_size} ranks x {config.micro_batch_size}"
        f" x {workload.gradient_accumulation_steps(config)} steps. How to use it: README.md\n"
    )


def _best_document(study: Study, best: Best) -> dict[str, Any]:
    space = study.space
    return {
        "format": FORMAT,
        "study": space.name,
        "model": space.model.name,
        "weights": space.file.weights,
        "cluster": space.cluster.describe(),
        "trial": best.trial,
        "config": best.config.to_dict(),
        "workload": {
            "global_batch_size": space.workload.global_batch_size,
            "gradient_accumulation_steps": space.workload.gradient_accumulation_steps(best.config),
            "data_parallel_size": best.config.data_parallel_size,
        },
        "measured": figures(best.measurement),
        "confirmed": best.measurement.confirms,
    }


def figures(measurement: Measurement) -> dict[str, Any]:
    """The figures of a measurement that belong in a summary."""
    return {
        "tokens_per_second_per_gpu": measurement.tokens_per_second_per_gpu,
        "step_time_seconds": measurement.step_time_seconds,
        "model_flops_utilization": measurement.model_flops_utilization,
        "peak_memory_allocated_bytes": measurement.peak_memory_allocated_bytes,
        "peak_memory_reserved_bytes": measurement.peak_memory_reserved_bytes,
        "peak_device_used_bytes": measurement.peak_device_used_bytes,
        "device_memory_bytes": measurement.device_memory_bytes,
    }


def _provenance(study: Study, sources: dict[str, Best]) -> dict[str, Any]:
    space, best = study.space, sources["best.yaml"]
    baseline, confirmed_baseline = study.baseline_outcome, _confirmed_baseline(study)
    return {
        "autotune": __version__,
        "study": space.name,
        "model": {"name": space.model.name, "config_digest": space.model.digest, "weights": space.file.weights},
        "cluster": space.cluster.describe(),
        "environment": best.measurement.ranks[0].environment,
        "files": {
            name: {
                "trial": source.trial,
                "fingerprint": source.config.fingerprint,
                "measured": figures(source.measurement),
                "confirmed": source.measurement.confirms,
            }
            for name, source in sources.items()
        },
        "baseline": None
        if baseline is None or space.baseline is None
        else {
            "config": space.baseline.to_dict(),
            "outcome": figures(confirmed_baseline or baseline)
            if isinstance(baseline, Measurement)
            else baseline.kind.value,
            "confirmed": confirmed_baseline is not None,
        },
        "method": {
            "warmup_optimizer_steps": space.measure.warmup,
            "measured_micro_steps": space.measure.micro_steps,
            "confirmed": best.measurement.confirms,
        },
        "confirmation": None
        if study.verdict is None or best != study.best()
        else {
            "optimizer_steps": study.verdict.steps,
            "rounds": ROUNDS,
            "trials": [contender.trial for contender in study.verdict.confirmed],
            "gain": None if study.verdict.gain is None else dataclasses.asdict(study.verdict.gain),
            "significant": study.verdict.significant,
        },
    }


def _confirmed_baseline(study: Study) -> Measurement | None:
    verdict = study.verdict
    return None if verdict is None or verdict.baseline is None else verdict.baseline.measurement


def _json(document: Any) -> str:
    return json.dumps(document, indent=2) + "\n"


def _yaml(document: Any) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
