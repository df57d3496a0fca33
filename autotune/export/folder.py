"""Writes the best folder, the Pareto folder, and single files for the terminal."""

import shutil
from pathlib import Path
from typing import Any

from autotune.confirmation import ROUNDS
from autotune.errors import NothingFeasibleError, UsageError
from autotune.export.documents import best_document, figures, provenance
from autotune.export.files import FORMATS, Format, nodes_of
from autotune.export.text import TEMPLATES, as_json, as_yaml
from autotune.formats.accelerate_yaml import DEEPSPEED_FILE, parallelism_environment
from autotune.formats.targets import left_to_script
from autotune.formats.training_args import to_training_args
from autotune.results import Best
from autotune.space.space import Space
from autotune.spec.config import TrialConfig
from autotune.spec.nvme import stored_bytes
from autotune.spec.outcome import Measurement
from autotune.study import Study
from autotune.units import format_bytes, format_rate, format_seconds


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
    documents["pareto.json"] = as_json({"study": study.space.name, "points": points})
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
        return {"best.yaml": as_yaml(best_document(study, best))}
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
    documents = {"best.yaml": as_yaml(best_document(study, best))}
    documents |= {form.file: form.write(study, source) for form, source in sources}
    if modes:
        documents["launch.sh"] = TEMPLATES.get_template("launch.sh.j2").render(study=space.name, modes=modes)
    trials = {"best.yaml": best} | {form.file: source for form, source in sources}
    documents["provenance.json"] = as_json(provenance(study, trials))
    documents["README.md"] = TEMPLATES.get_template("best_readme.md.j2").render(
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
        nvme_path=space.cluster.nvme_path if best.config.swaps else None,
        parameters_swapped=best.config.swaps_parameters,
        swapped_bytes=stored_bytes(best.config, space.model, space.cluster.gpus_per_node),
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
    nodes = nodes_of(source.config, space)
    ranks_per_node = source.config.ranks // nodes
    torchrun = f"torchrun {'--standalone' if nodes == 1 else f'--nnodes {nodes} …'} --nproc-per-node {ranks_per_node}"
    # accelerate's launcher makes it of its file; of what TrainingArguments cannot say torchrun knows nothing.
    environment = parallelism_environment(source.config) if form.launch == "trainer" else {}
    variables = "".join(f"{name}={value} " for name, value in environment.items())
    in_turn = source.config.device_map == "auto"
    by_hand = {
        "trainer": f"{variables}{'python' if in_turn else torchrun} train.py {form.file}",
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
        "environment": environment,
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        "gpus": source.config.gpus,
        "in_turn": in_turn,
    }


def _left_to_script(form: Format, config: TrialConfig, space: Space) -> list[str]:
    if not form.targets:
        return []
    todo = left_to_script(form.targets[0], config, space.workload)
    if form is FORMATS["deepspeed-hf"]:
        arguments = to_training_args(config, space.workload, space.cluster.device, space.cluster.nvme_path)
        del arguments["deepspeed"]
        todo.append(f"has the arguments `{', '.join(f'{name}={value!r}' for name, value in arguments.items())}`")
    return todo
