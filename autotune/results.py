"""What a study's trials amount to: which outcome stands, how many ended how, which is the best."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome, Phase
from autotune.spec.prediction import Prediction
from autotune.spec.record import AttemptRecord, AttemptState, TrialRecord

LOST = frozenset({FailureKind.WORKER_LOST, FailureKind.NODE_LOST})
"""Failures of the infrastructure: they say nothing about the config, which is run again."""

UNSTABLE = frozenset({FailureKind.HANG, FailureKind.CRASH, FailureKind.NON_FINITE_LOSS})
"""Failures that may be chance: run once more before they are believed."""

MAX_LOST_ATTEMPTS = 4
MAX_UNSTABLE_ATTEMPTS = 2
MAX_HOST_MEMORY_ATTEMPTS = 2
"""The second one runs alone: trials at the same time share the host's memory."""

CUT_OFF = Failure(kind=FailureKind.INTERRUPTED, phase=Phase.START, message="the driver ended while the trial ran")
"""Stands for the outcome of an attempt that has none."""


class Result(NamedTuple):
    """A trial whose outcome stands."""

    trial: int
    config: TrialConfig
    outcome: Outcome


class Best(NamedTuple):
    """A measured trial."""

    trial: int
    config: TrialConfig
    measurement: Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Trials by state. A trial that is to be run again counts as none of the finished ones."""

    complete: int
    out_of_memory: int
    failed: int
    interrupted: int
    """Cut off and not finished since."""
    stopped_early: int = 0
    running: int = 0

    @property
    def finished(self) -> int:
        """Trials whose outcome stands."""
        return self.complete + self.out_of_memory + self.stopped_early + self.failed


class Use(StrEnum):
    """What GPU-seconds went into."""

    SCREENING = "screening"
    CONFIRMING = "confirming"
    STOPPED_EARLY = "stopped_early"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


def use_of(outcome: Outcome, *, confirming: bool) -> Use:
    """What an attempt of that outcome used its GPUs for."""
    if isinstance(outcome, Measurement):
        return Use.CONFIRMING if confirming else Use.SCREENING
    if outcome.kind.is_memory:
        return Use.OUT_OF_MEMORY
    named = {FailureKind.STOPPED_EARLY: Use.STOPPED_EARLY, FailureKind.INTERRUPTED: Use.INTERRUPTED}
    return named.get(outcome.kind, Use.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Predicted memory and speed against what trials showed."""

    errors: tuple[float, ...]
    """predicted / measured - 1 of the device's used peak, for each measured trial, by number."""
    surprises: tuple[int, ...]
    """Trials that ran out of memory, or left too little headroom, though they were predicted to fit, by number."""
    speed_errors: tuple[float, ...] = ()
    """predicted / measured - 1 of the throughput, as the plan had it before any trial, by number."""
    launch_errors: tuple[float, ...] = ()
    """The same of what was expected when the trial was launched, after those before it, by number."""

    @property
    def median_speed_error(self) -> float:
        """Without sign; 0 where nothing was predicted and measured."""
        return _median_size(self.speed_errors)

    @property
    def median_launch_error(self) -> float:
        """Without sign; 0 where nothing was expected and measured."""
        return _median_size(self.launch_errors)

    @property
    def largest_error(self) -> float:
        """Without sign; 0 where nothing was measured."""
        return max((abs(error) for error in self.errors), default=0.0)

    @property
    def median_error(self) -> float:
        """Without sign; 0 where nothing was measured."""
        return _median_size(self.errors)


def ledger(results: Iterable[Result], predictions: Mapping[TrialConfig, Prediction], usable_bytes: float) -> Ledger:
    """The ledger of the trials that were predicted.

    Args:
        results: trials whose outcome stands, by number.
        predictions: what was predicted of them; those without are left out.
        usable_bytes: device memory less the headroom.
    """
    errors: list[float] = []
    surprises: list[int] = []
    speeds: list[float] = []
    launches: list[float] = []
    for number, config, outcome in results:
        if config not in predictions:
            continue
        predicted = predictions[config].device_used_bytes
        if isinstance(outcome, Measurement):
            errors.append(predicted / outcome.peak_device_used_bytes - 1)
            speed, proposal = predictions[config].tokens_per_second_per_gpu, predictions[config].proposal
            if speed is not None:
                speeds.append(speed / outcome.tokens_per_second_per_gpu - 1)
                if proposal is not None:
                    launches.append((proposal["throughput"] or 0.0) / outcome.tokens_per_second_per_gpu - 1)
            full = outcome.peak_device_used_bytes > usable_bytes or outcome.allocator_retries > 0
        else:
            full = outcome.kind.is_memory
        if full and predicted <= usable_bytes:
            surprises.append(number)
    return Ledger(
        errors=tuple(errors),
        surprises=tuple(surprises),
        speed_errors=tuple(speeds),
        launch_errors=tuple(launches),
    )


def _median_size(errors: Sequence[float]) -> float:
    return statistics.median(abs(error) for error in errors) if errors else 0.0


def standing_outcome(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The outcome of a config that was attempted these times; None while it must be run again."""
    if not outcomes:
        return None
    last = outcomes[-1]
    if isinstance(last, Measurement):
        return last
    kinds = [outcome.kind for outcome in outcomes if isinstance(outcome, Failure)]
    if last.kind in LOST:
        stands = sum(kind in LOST for kind in kinds) >= MAX_LOST_ATTEMPTS
    elif last.kind in UNSTABLE:
        stands = sum(kind in UNSTABLE for kind in kinds) >= MAX_UNSTABLE_ATTEMPTS
    elif last.kind is FailureKind.HOST_OUT_OF_MEMORY:
        stands = kinds.count(last.kind) >= MAX_HOST_MEMORY_ATTEMPTS
    else:
        # A driver that was stopped says nothing about the config, however often it happens.
        stands = last.kind is not FailureKind.INTERRUPTED
    return last if stands else None


def must_run_alone(outcomes: Sequence[Outcome]) -> bool:
    """Whether the next attempt of a config that was attempted these times must be the only one that runs."""
    return any(isinstance(o, Failure) and o.kind is FailureKind.HOST_OUT_OF_MEMORY for o in outcomes)


def attempted_outcomes(trial: TrialRecord) -> list[Outcome]:
    """What came of each attempt to screen it that ended, in order."""
    ended = [attempt for attempt in trial.screenings if attempt.state is not AttemptState.RUNNING]
    return [ended_outcome(attempt) for attempt in ended]


def ended_outcome(attempt: AttemptRecord) -> Outcome:
    """What came of an attempt that does not run any more."""
    return CUT_OFF if attempt.outcome is None else attempt.outcome


def eligible(measurement: Measurement, memory_headroom: float) -> bool:
    """Whether a measurement left the headroom (0..1 of the device) free.

    The allocator having had to flush its cache and try again means that it was at the limit already.
    """
    usable = (1 - memory_headroom) * measurement.device_memory_bytes
    return measurement.allocator_retries == 0 and measurement.peak_device_used_bytes <= usable


def fastest(results: Iterable[Result], memory_headroom: float) -> Best | None:
    """The fastest eligible trial; None when there is none."""
    found = [
        Best(number, config, outcome)
        for number, config, outcome in results
        if isinstance(outcome, Measurement) and eligible(outcome, memory_headroom)
    ]
    return max(found, key=lambda best: (best.measurement.tokens_per_second_per_gpu, -best.trial), default=None)


def pareto_front(found: Iterable[Best]) -> list[Best]:
    """Those that no other one matches in throughput, peak memory and sequence length while it beats it in one of them.

    Of several that are equal in all three, the earliest trial. The fastest first.
    """

    def merits(best: Best) -> tuple[float, float, float]:
        measured = best.measurement
        return (
            measured.tokens_per_second_per_gpu,
            -measured.peak_device_used_bytes,
            best.config.sequence_length,
        )

    front: list[Best] = []
    for best in sorted(found, key=lambda best: (*(-merit for merit in merits(best)), best.trial)):
        if not any(all(a >= b for a, b in zip(merits(other), merits(best), strict=True)) for other in front):
            front.append(best)
    return front


def count(outcomes: Iterable[Outcome], interrupted: int = 0, running: int = 0) -> Counts:
    """Trials by the outcomes that stand."""
    listed = list(outcomes)
    failures = [outcome for outcome in listed if isinstance(outcome, Failure)]
    memory = sum(failure.kind.is_memory for failure in failures)
    stopped = sum(failure.kind is FailureKind.STOPPED_EARLY for failure in failures)
    return Counts(
        complete=len(listed) - len(failures),
        out_of_memory=memory,
        failed=len(failures) - memory - stopped,
        stopped_early=stopped,
        interrupted=interrupted,
        running=running,
    )


def standing_results(trials: Iterable[TrialRecord]) -> list[Result]:
    """Every stored trial whose outcome stands, in the order given."""
    standing = ((trial.number, trial.config, standing_outcome(attempted_outcomes(trial))) for trial in trials)
    return [Result(number, config, outcome) for number, config, outcome in standing if outcome is not None]


def stored_counts(trials: Sequence[TrialRecord]) -> Counts:
    """Stored trials by state."""
    last = (trial.screenings[-1:] for trial in trials)
    running = sum(attempt.state is AttemptState.RUNNING for attempts in last for attempt in attempts)
    results = standing_results(trials)
    return count(
        (result.outcome for result in results), interrupted=len(trials) - len(results) - running, running=running
    )
