"""What the best folder says of itself: `best.yaml` and `provenance.json`."""

import dataclasses
from typing import Any

from autotune import __version__
from autotune.confirmation import ROUNDS
from autotune.results import Best
from autotune.spec.outcome import Measurement
from autotune.study import Study

FORMAT = "autotune-best/1"


def best_document(study: Study, best: Best) -> dict[str, Any]:
    """What `best.yaml` has: the config, what it is for, and what was measured."""
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


def provenance(study: Study, sources: dict[str, Best]) -> dict[str, Any]:
    """How the best files came about.

    Args:
        study: that they are of.
        sources: the trial behind each file, by its name; `best.yaml` among them.
    """
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
