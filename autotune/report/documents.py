"""A study as plain JSON data: what `--json` prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autotune.predict.remedies import Remedy
from autotune.report.speeds import cost_per_million_tokens
from autotune.report.verdict import verdict_document
from autotune.results import Best, Counts, Ledger, attempted_outcomes, standing_outcome
from autotune.space.space import Space
from autotune.spec.record import AttemptRecord, StudyRecord, TrialRecord
from autotune.study import Study


def study_document(study: Study, artifacts: dict[str, Path]) -> dict[str, Any]:
    """The result of `tune`."""
    best, baseline = study.best(), study.baseline_outcome
    return {
        "study": study.space.name,
        "trials": counts_document(study.counts),
        "stop_reason": study.stop_reason,
        "gpu_seconds": {use.value: seconds for use, seconds in study.spending.gpu_seconds_by_use.items()},
        "best": None if best is None else best_document(best, study.space),
        "pareto": pareto_document(study),
        "baseline": None if baseline is None else baseline.to_dict(),
        "confirmation": None if study.verdict is None else verdict_document(study.verdict),
        "sensitivity": None if study.sensitivity is None else study.sensitivity.to_dict(),
        "prediction": ledger_document(study.ledger),
        "artifacts": {name: str(path) for name, path in artifacts.items()},
    }


def ledger_document(ledger: Ledger) -> dict[str, Any]:
    """Predicted and measured memory and speed."""
    return {
        "measured": len(ledger.errors),
        "median_error": ledger.median_error,
        "largest_error": ledger.largest_error,
        "surprises": list(ledger.surprises),
        "speed": {
            "measured": len(ledger.speed_errors),
            "median_error": ledger.median_speed_error,
            "median_error_when_launched": ledger.median_launch_error if ledger.launch_errors else None,
        },
    }


def remedies_document(remedies: Sequence[Remedy]) -> list[dict[str, Any]]:
    """What would fit where nothing does."""
    return [
        {"change": words, "device_used_bytes": used, "config": config.to_dict()} for words, config, used in remedies
    ]


def studies_document(rows: list[tuple[StudyRecord, Counts]]) -> dict[str, Any]:
    """The result of `studies`."""
    return {
        "studies": [
            {"study": study.name, "created_at": study.created_at.isoformat(), "trials": counts_document(counts)}
            for study, counts in rows
        ]
    }


def best_document(best: Best, space: Space) -> dict[str, Any]:
    """One measured trial."""
    return {
        "trial": best.trial,
        "config": best.config.to_dict(),
        "measurement": best.measurement.to_dict(),
        "cost_per_million_tokens": cost_per_million_tokens(space, best.measurement.tokens_per_second_per_gpu),
    }


def pareto_document(study: Study) -> list[dict[str, Any]]:
    """The trials that trade throughput for peak memory best, the fastest first."""
    return [
        {
            "trial": best.trial,
            "config": best.config.to_dict(),
            "tokens_per_second_per_gpu": best.measurement.tokens_per_second_per_gpu,
            "peak_device_used_bytes": best.measurement.peak_device_used_bytes,
            "sequence_length": best.config.sequence_length,
            "cost_per_million_tokens": cost_per_million_tokens(study.space, best.measurement.tokens_per_second_per_gpu),
            "confirmed": best.measurement.confirms,
        }
        for best in study.pareto_front
    ]


def trial_document(trial: TrialRecord) -> dict[str, Any]:
    """One trial with all its attempts; `outcome` is the one that stands, or null."""
    outcome = standing_outcome(attempted_outcomes(trial))
    return {
        "trial": trial.number,
        "fingerprint": trial.fingerprint,
        "source": trial.source,
        "prediction": None if trial.prediction is None else trial.prediction.to_dict(),
        "config": trial.config.to_dict(),
        "outcome": None if outcome is None else outcome.to_dict(),
        "attempts": [_attempt_document(attempt) for attempt in trial.attempts],
    }


def counts_document(counts: Counts) -> dict[str, int]:
    """Trials by state."""
    return {
        "complete": counts.complete,
        "out_of_memory": counts.out_of_memory,
        "stopped_early": counts.stopped_early,
        "failed": counts.failed,
        "interrupted": counts.interrupted,
    }


def _attempt_document(attempt: AttemptRecord) -> dict[str, Any]:
    return {
        "attempt": attempt.number,
        "confirmation": None if attempt.turn is None else attempt.turn._asdict(),
        "state": attempt.state.value,
        "started_at": attempt.started_at.isoformat(),
        "finished_at": None if attempt.finished_at is None else attempt.finished_at.isoformat(),
        "outcome": None if attempt.outcome is None else attempt.outcome.to_dict(),
    }
