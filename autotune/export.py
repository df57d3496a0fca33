"""The best folder: files that the engineer's own tools take, each made from a trial that was measured.

Every file is written by the translation that the trial itself used (`autotune.formats`). A file whose format cannot
express the overall winner is made from the fastest trial that it can express, and says which trial that is.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from autotune import __version__
from autotune.errors import UsageError
from autotune.formats.deepspeed_json import check_deepspeed, to_deepspeed
from autotune.results import Best
from autotune.space.space import Space
from autotune.spec.outcome import Measurement
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
    documents = _documents(study, best)
    target = (out / "best").absolute()
    fresh = target.with_name(".best.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name, text in documents.items():
            (fresh / name).write_text(text, encoding="utf-8")
        for script in fresh.glob("*.sh"):
            script.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror}); name a writable folder with --out") from None
    return {name: target / name for name in documents}


def _documents(study: Study, best: Best) -> dict[str, str]:
    space = study.space
    sources = {"best.yaml": best}
    documents = {"best.yaml": _yaml(_best_document(study, best))}
    deepspeed = study.best(engine="deepspeed")
    if deepspeed is not None:
        document = to_deepspeed(deepspeed.config, space.workload)
        check_deepspeed(document)
        sources["ds_config.json"] = deepspeed
        documents["ds_config.json"] = _json(document)
        sources["launch.sh"] = deepspeed
        documents["launch.sh"] = _launch_script(space, deepspeed)
    documents["provenance.json"] = _json(_provenance(study, sources))
    documents["README.md"] = _TEMPLATES.get_template("best_readme.md.j2").render(
        study=space.name,
        model=space.model.name,
        cluster=space.cluster.describe(),
        best=best,
        deepspeed=deepspeed,
        baseline=study.baseline_outcome if isinstance(study.baseline_outcome, Measurement) else None,
        format_bytes=format_bytes,
        format_rate=format_rate,
        format_seconds=format_seconds,
    )
    return documents


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
    baseline = study.baseline_outcome
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
            }
            for name, source in sources.items()
        },
        "baseline": None
        if baseline is None or space.baseline is None
        else {
            "config": space.baseline.to_dict(),
            "outcome": figures(baseline) if isinstance(baseline, Measurement) else baseline.kind.value,
        },
        "method": {
            "warmup_optimizer_steps": space.measure.warmup,
            "measured_micro_steps": space.measure.micro_steps,
            "confirmed": False,
        },
    }


def _launch_script(space: Space, best: Best) -> str:
    nodes = -(-best.config.gpus // space.cluster.gpus_per_node)
    return _TEMPLATES.get_template("launch.sh.j2").render(
        study=space.name,
        trial=best.trial,
        describe=best.config.describe(),
        nodes=nodes,
        gpus_per_node=best.config.gpus // nodes,
    )


def _json(document: Any) -> str:
    return json.dumps(document, indent=2) + "\n"


def _yaml(document: Any) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
