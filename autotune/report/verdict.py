"""What a confirmation says, in words and as plain JSON data: who won, by how much, how sure that is."""

from typing import Any

from autotune.confirmation import ROUNDS, Confirmed, Interval, Verdict
from autotune.results import Best
from autotune.spec.outcome import Failure, LongRun, Measurement
from autotune.study import Study
from autotune.units import format_bytes, format_rate, format_seconds


def speed_text(study: Study, best: Best) -> str:
    """The winner's throughput, with its interval where it is confirmed."""
    speed = f"{format_rate(best.measurement.tokens_per_second_per_gpu)} tokens/s/GPU"
    verdict = study.verdict
    confirmed = None if verdict is None else verdict.of(best.trial)
    if verdict is None or confirmed is None:
        return f"{speed}, by one short run"
    interval = confirmed.throughput
    return f"{speed} ({format_rate(interval.low)} to {format_rate(interval.high)}) over {verdict.steps} optimizer steps"


def gain_text(study: Study, best: Best) -> str | None:
    """Against the baseline; None without one or before it ran."""
    verdict, screened = study.verdict, study.baseline_outcome
    if screened is None:
        return None
    if isinstance(screened, Failure):
        ending = screened.kind.value.replace("_", " ")
        return f"it fits, where the baseline runs {ending}" if screened.kind.is_memory else f"the baseline: {ending}"
    if verdict is None:
        ratio = best.measurement.tokens_per_second_per_gpu / screened.tokens_per_second_per_gpu
        base = format_rate(screened.tokens_per_second_per_gpu)
        return f"{ratio:.2f}x the baseline's {base}, by short runs, not confirmed"
    if verdict.baseline is None:
        failed = next((f for _, config, f in verdict.failed if config == study.space.baseline), None)
        ending = "did not finish" if failed is None else f"ended with {failed.kind.value.replace('_', ' ')}"
        return f"the baseline {ending} when it was confirmed"
    if verdict.gain is None:
        return "none: the baseline itself is the fastest"
    base = format_rate(verdict.baseline.throughput.estimate)
    words = f"{_ratios(verdict.gain)} the baseline's {base}"
    return words if verdict.significant else f"no significant gain: {words}"


def confirmation_text(study: Study) -> str:
    """How it was confirmed, or why it was not."""
    verdict = study.verdict
    if verdict is None:
        if not study.space.file.measure.confirm_top:
            return "no: confirm_top is 0"
        return f"no: {study.spent} are spent" if study.spent else "not yet: the same command goes on"
    names = [_name(study, contender) for contender in verdict.confirmed]
    words = f"{', '.join(names)} in turns, {ROUNDS} runs of {verdict.steps // ROUNDS} optimizer steps each"
    return f"{words}; intervals are 95 %"


def notes(study: Study) -> list[str]:
    """What a job should know of the winner beyond its speed, and what limits the comparison."""
    verdict, found = study.verdict, []
    if verdict is None or verdict.winner is None:
        return []
    winner = verdict.winner
    for trial, _, failure in verdict.failed:
        found.append(f"trial {trial} ended with {failure.kind.value.replace('_', ' ')} when it was confirmed")
    found += [f"trial {c.trial} left too little headroom" for c in verdict.confirmed if not c.eligible]
    runs = long_runs(winner.measurement)
    evaluated = [run.evaluation_seconds for run in runs if run.evaluation_seconds is not None]
    if evaluated:
        found.append(f"an evaluation pass took {format_seconds(max(evaluated))}")
    saved = [run.checkpoint_seconds for run in runs if run.checkpoint_seconds is not None]
    if saved:
        size = sum(run.checkpoint_bytes for run in runs)
        found.append(f"a checkpoint of {format_bytes(size)} took {format_seconds(max(saved))}")
    found += [f"no checkpoint was tried: {reason}" for reason in {r.checkpoint_skipped for r in runs} - {None}]
    if winner.memory_growth:
        found.append(f"live memory grew by {format_bytes(winner.memory_growth)} a step")
    reasons = sorted({reason for run in runs if run.gpu for reason in run.gpu.throttle_reasons})
    if reasons:
        hottest = max(run.gpu.hottest_celsius for run in runs if run.gpu)
        found.append(f"clocks were held down ({', '.join(reasons)}) at up to {hottest} °C")
    if verdict.hosts_differ:
        found.append("contenders ran on different machines, which may be what differs")
    return found


def long_runs(measurement: Measurement) -> list[LongRun]:
    """Of every rank and round."""
    return [rank.long_run for rank in measurement.ranks if rank.long_run is not None]


def verdict_document(verdict: Verdict) -> dict[str, Any]:
    """A confirmation as JSON data."""
    return {
        "number": verdict.number,
        "rounds": ROUNDS,
        "optimizer_steps": verdict.steps,
        "confidence": 0.95,
        "winner": None if verdict.winner is None else verdict.winner.trial,
        "gain": None if verdict.gain is None else _interval_document(verdict.gain),
        "significant": verdict.significant,
        "hosts_differ": verdict.hosts_differ,
        "contenders": [_confirmed_document(contender) for contender in verdict.confirmed],
        "failed": [{"trial": trial, "outcome": failure.to_dict()} for trial, _, failure in verdict.failed],
    }


def _confirmed_document(contender: Confirmed) -> dict[str, Any]:
    runs = long_runs(contender.measurement)
    evaluations = [run.evaluation_seconds for run in runs if run.evaluation_seconds is not None]
    checkpoints = [run.checkpoint_seconds for run in runs if run.checkpoint_seconds is not None]
    return {
        "trial": contender.trial,
        "config": contender.config.to_dict(),
        "eligible": contender.eligible,
        "tokens_per_second_per_gpu": _interval_document(contender.throughput),
        "step_time_seconds": contender.measurement.step_time_seconds,
        "peak_device_used_bytes": contender.measurement.peak_device_used_bytes,
        "memory_growth_bytes_per_step": contender.memory_growth,
        "evaluation_seconds": max(evaluations, default=None),
        "checkpoint_seconds": max(checkpoints, default=None),
        "checkpoint_bytes": sum(run.checkpoint_bytes for run in runs),
        "checkpoint_skipped": next((run.checkpoint_skipped for run in runs if run.checkpoint_skipped), None),
    }


def _interval_document(interval: Interval) -> dict[str, float]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def _ratios(interval: Interval) -> str:
    return f"{interval.estimate:.2f}x ({interval.low:.2f}x to {interval.high:.2f}x)"


def _name(study: Study, contender: Confirmed) -> str:
    return "baseline" if contender.config == study.space.baseline else f"trial {contender.trial}"
