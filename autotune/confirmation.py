"""Confirmation: the baseline and the finalists run again, and only those runs say who wins and by how much.

Screening runs are short, sample the micro-steps of a step, and of many noisy figures the largest is too large. So the
contenders run again on the same nodes, nothing beside them, in turns (A B C, A B C), each turn in fresh processes. The
winner has the highest lower bound of its throughput.

A run's mean step time is one observation: steps of one run are alike, and what differs from run to run (placement,
clocks, the allocator) does not average out within one. With y_ki the logarithm of the mean step time of contender k in
round i, the variance of one y is

    v_k = max(sum_ki (y_ki - mean_i y_ki - mean_k y_ki + mean y)² / ((K - 1)·(R - 1)),  s_k² / n)

the first being what runs differ by, pooled over all contenders, without what made a whole round slower for all of them;
the second what n steps with deviation s_k around their run's mean explain alone, so that R runs that agree by chance
make nothing certain. Throughputs and ratios of two have Student's interval with (K - 1)·(R - 1) degrees of freedom on
the logarithm, var = v_k / R (random effects of runs: Kalibera & Jones, "Rigorous benchmarking in reasonable time", ISMM
2013, sections 5 and 7; contenders in rounds are randomised blocks, as in any text on the analysis of variance). A
throughput's interval is therefore for comparing: it does not say how it would be on another day. Where K is 1 there is
nothing to compare, and rounds count as they are.

Left out: that the finalists are the best of many, which biases who is a contender but not these runs; and drift within
a round, which turns make equal for all only on average.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from autotune.results import Result, eligible, standing_outcome
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Failure, Measurement, Outcome, RankMeasurement
from autotune.spec.record import Turn

ROUNDS = 2
CONFIDENCE = 0.95
"""Of two-sided intervals."""
SCREENING_CONFIDENCE = 0.9
"""Of the two-sided interval whose lower end ranks the finalists."""
LEAK_DEVIATIONS = 3.0
"""Standard errors by which live memory must grow to be called growing."""


class Run(NamedTuple):
    """An attempt to confirm that ended."""

    trial: int
    turn: Turn
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """A contender that ran in every round."""

    trial: int
    config: TrialConfig
    measurement: Measurement
    """Of all rounds together."""
    throughput: Interval
    """Tokens per second and GPU."""
    memory_growth: float
    """Bytes of live tensors by which a step leaves the fullest rank fuller; 0.0 where it is no more than noise."""
    eligible: bool
    """Whether it left the memory headroom, evaluation and checkpoint included."""

    @property
    def hosts(self) -> frozenset[str]:
        """Machines that it ran on."""
        return frozenset(rank.long_run.host for rank in self.measurement.ranks if rank.long_run is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a finished confirmation says."""

    number: int
    steps: int
    """Optimizer steps that count, of each contender, over all rounds."""
    confirmed: tuple[Confirmed, ...]
    """The baseline first, then finalists by their screening."""
    failed: tuple[tuple[int, TrialConfig, Failure], ...]
    """Contenders that did not run to the end."""
    baseline: Confirmed | None
    winner: Confirmed | None
    """None if no contender is eligible."""
    gain: Interval | None
    """Throughput of the winner / that of the baseline; None without a confirmed baseline, or where it wins itself."""

    @property
    def significant(self) -> bool:
        """Whether the winner is faster than the baseline beyond doubt."""
        return self.gain is not None and self.gain.low > 1

    @property
    def hosts_differ(self) -> bool:
        """Whether contenders of one size ran on different machines: then these may be what differs."""
        sizes = {contender.config.gpus for contender in self.confirmed}
        hosts = {(contender.config.gpus, contender.hosts) for contender in self.confirmed}
        return len(hosts) > len(sizes)

    def of(self, trial: int) -> Confirmed | None:
        """A trial's figures."""
        return next((contender for contender in self.confirmed if contender.trial == trial), None)


class Confirmation:
    """Which run is next, and what the runs amount to. Made anew from what the store has; decides the same each time.

    Runs of different confirmations are never compared. One that was cut off goes on; when the screening has found other
    contenders since, or none of the finalists got through, the next confirmation begins.

    Args:
        results: of the screening.
        runs: of every confirmation of the study, in the order of their attempts.
        baseline: the file's.
        top: finalists.
        steps: optimizer steps that count of each contender, at least.
        headroom: of the device's memory, that must stay free (0..1).
        accumulation: micro-steps of an optimizer step.
    """

    def __init__(
        self,
        results: Sequence[Result],
        runs: Iterable[Run],
        *,
        baseline: TrialConfig | None,
        top: int,
        steps: int,
        headroom: float,
        accumulation: Callable[[TrialConfig], int],
    ) -> None:
        self._headroom = headroom
        self.steps_per_round = -(-steps // ROUNDS)
        outcomes: dict[tuple[Turn, int], list[Outcome]] = {}
        for run in runs:
            outcomes.setdefault((run.turn, run.trial), []).append(run.outcome)
        excluded: set[int] = set()
        self.number = max((turn.confirmation for turn, _ in outcomes), default=1)
        for number in range(1, self.number):
            excluded |= self._unfit(number, outcomes)
        while True:
            self._outcomes = {key: found for key, found in outcomes.items() if key[0].confirmation == self.number}
            self.contenders = contenders(results, baseline, top, headroom, accumulation, excluded)
            if self._goes_on(baseline):
                return
            excluded |= self._unfit(self.number, outcomes)
            self.number += 1

    @cached_property
    def next(self) -> tuple[Result, Turn] | None:
        """The contender and the turn to run next; None when all is confirmed."""
        for number in range(1, ROUNDS + 1):
            turn = Turn(self.number, number)
            for contender in self.contenders:
                if self._failure(contender.trial) is None and self._standing(turn, contender.trial) is None:
                    return contender, turn
        return None

    @cached_property
    def verdict(self) -> Verdict | None:
        """What it says; None while runs are missing, or without contenders."""
        if self.next is not None or not self.contenders:
            return None
        through = [c for c in self.contenders if self._failure(c.trial) is None]
        runs = [[m for m in self._measurements(c.trial) if m is not None] for c in through]
        failures = [(c.trial, c.config, self._failure(c.trial)) for c in self.contenders]
        deviations, degrees = _deviations(runs)
        confirmed = []
        for contender, measurements, deviation in zip(through, runs, deviations, strict=True):
            merged = merge(measurements)
            confirmed.append(
                Confirmed(
                    trial=contender.trial,
                    config=contender.config,
                    measurement=merged,
                    throughput=_interval(merged.tokens_per_second_per_gpu, deviation, degrees),
                    memory_growth=memory_growth(measurements),
                    eligible=eligible(merged, self._headroom),
                )
            )
        able = [contender for contender in confirmed if contender.eligible]
        winner = max(able, key=lambda contender: (contender.throughput.low, -contender.trial), default=None)
        baseline = next((c for c in confirmed if self._baseline is not None and c.trial == self._baseline.trial), None)
        gain = None
        if winner is not None and baseline is not None and winner is not baseline:
            ratio = winner.throughput.estimate / baseline.throughput.estimate
            mine, its = (deviations[confirmed.index(one)] for one in (winner, baseline))
            gain = _interval(ratio, math.hypot(mine, its), degrees)
        return Verdict(
            number=self.number,
            steps=ROUNDS * self.steps_per_round,
            confirmed=tuple(confirmed),
            failed=tuple((trial, config, failure) for trial, config, failure in failures if failure is not None),
            baseline=baseline,
            winner=winner,
            gain=gain,
        )

    def _goes_on(self, baseline: TrialConfig | None) -> bool:
        """Whether the runs of this number are of these contenders, and one of the finalists may still be confirmed."""
        self._baseline = next((c for c in self.contenders if c.config == baseline), None)
        ran = {trial for _, trial in self._outcomes}
        wanted = {contender.trial for contender in self.contenders}
        begun = any(turn.round > 1 for turn, _ in self._outcomes)
        if not ran <= wanted or (begun and ran != wanted):
            return False
        if any(_steps(m) != self.steps_per_round for trial in ran for m in self._measurements(trial) if m is not None):
            return False
        finalists = [c.trial for c in self.contenders if self._baseline is None or c.trial != self._baseline.trial]
        return not finalists or not all(self._is_unfit(trial) for trial in finalists)

    def _standing(self, turn: Turn, trial: int) -> Outcome | None:
        return standing_outcome(self._outcomes.get((turn, trial), []))

    def _measurements(self, trial: int) -> list[Measurement | None]:
        turns = [Turn(self.number, number) for number in range(1, ROUNDS + 1)]
        found = [self._standing(turn, trial) for turn in turns]
        return [outcome if isinstance(outcome, Measurement) else None for outcome in found]

    def _failure(self, trial: int) -> Failure | None:
        found = (self._standing(turn, key) for turn, key in self._outcomes if key == trial)
        return next((outcome for outcome in found if isinstance(outcome, Failure)), None)

    def _is_unfit(self, trial: int) -> bool:
        measured = [m for m in self._measurements(trial) if m is not None]
        return self._failure(trial) is not None or not all(eligible(m, self._headroom) for m in measured)

    def _unfit(self, number: int, outcomes: Mapping[tuple[Turn, int], Sequence[Outcome]]) -> set[int]:
        """Trials that failed, or left too little headroom, in a confirmation."""
        found = set()
        for (turn, trial), ended in outcomes.items():
            outcome = standing_outcome(ended)
            if turn.confirmation == number and outcome is not None:
                fine = isinstance(outcome, Measurement) and eligible(outcome, self._headroom)
                found |= set() if fine else {trial}
        return found


def contenders(
    results: Sequence[Result],
    baseline: TrialConfig | None,
    top: int,
    headroom: float,
    accumulation: Callable[[TrialConfig], int],
    excluded: Iterable[int] = (),
) -> list[Result]:
    """The baseline, if it was measured, and the finalists: the eligible trials with the highest lower bounds.

    None at all where there is nothing to confirm.
    """
    if not top:
        return []
    skipped = set(excluded)
    reference = [r for r in results if r.config == baseline and isinstance(r.outcome, Measurement)]
    able = [
        (outcome, Result(trial, config, outcome))
        for trial, config, outcome in results
        if isinstance(outcome, Measurement)
        and eligible(outcome, headroom)
        and trial not in skipped
        and config != baseline
    ]
    able.sort(key=lambda pair: -pair[0].tokens_per_second_per_gpu)
    chosen: list[tuple[float, Result]] = []
    for outcome, result in able:
        if len(chosen) >= top and outcome.tokens_per_second_per_gpu <= chosen[-1][0]:
            break  # a bound is no higher than its throughput
        chosen.append((screening_lower_bound(outcome, accumulation(result.config)), result))
        chosen = sorted(chosen, key=lambda pair: -pair[0])[:top]
    return reference + [result for _, result in chosen]


def screening_lower_bound(measurement: Measurement, accumulation: int) -> float:
    """Tokens per second and GPU that a screening run has shown at least, as far as its own samples vary.

    A step is g - 1 micro-steps that accumulate and one that updates; the mean of either kind has the relative error
    s / sqrt(samples), with s the deviation of both kinds' samples from their means together.
    """
    bounds = [_rank_lower_bound(rank, accumulation) for rank in measurement.ranks]
    return measurement.tokens_per_second_per_gpu * min(bounds, default=1.0)


def merge(runs: Sequence[Measurement]) -> Measurement:
    """Runs of one config as one measurement: all their steps, the mean of their times, the highest of their peaks."""
    seconds = statistics.fmean(run.step_time_seconds for run in runs)
    first = runs[0]
    scale = first.step_time_seconds / seconds
    utilization = first.model_flops_utilization
    return replace(
        first,
        step_time_seconds=seconds,
        tokens_per_second_per_gpu=first.tokens_per_second_per_gpu * scale,
        model_flops_utilization=None if utilization is None else utilization * scale,
        peak_memory_allocated_bytes=max(run.peak_memory_allocated_bytes for run in runs),
        peak_memory_reserved_bytes=max(run.peak_memory_reserved_bytes for run in runs),
        peak_device_used_bytes=max(run.peak_device_used_bytes for run in runs),
        device_memory_bytes=min(run.device_memory_bytes for run in runs),
        allocator_retries=max(run.allocator_retries for run in runs),
        ranks=tuple(rank for run in runs for rank in run.ranks),
        elapsed_seconds=sum(run.elapsed_seconds for run in runs),
    )


def memory_growth(runs: Sequence[Measurement]) -> float:
    """Bytes a step by which the live tensors of a rank grow, the largest of all runs and ranks; 0.0 if that is noise.

    The least-squares slope, if it is positive by `LEAK_DEVIATIONS` of its standard errors.
    """
    return max(
        (_slope(rank.long_run.allocated_bytes) for run in runs for rank in run.ranks if rank.long_run), default=0
    )


def confirmation_seconds(measurement: Measurement, steps: int) -> float:
    """About how long confirming a screened config will take, in all rounds: starting, warming up and whole steps."""
    before = sum(measurement.phase_seconds.get(stage, 0.0) for stage in ("start", "build", "warmup"))
    return ROUNDS * (before + (-(-steps // ROUNDS) + 1) * measurement.step_time_seconds)


def _slope(values: Sequence[int]) -> float:
    if len(values) < 3:
        return 0.0
    at = np.arange(len(values)) - (len(values) - 1) / 2
    sizes = np.array(values, float)
    slope = float(at @ sizes / (at @ at))
    rest = sizes - sizes.mean() - slope * at
    error = float(np.sqrt(rest @ rest / (len(values) - 2) / (at @ at)))
    return slope if slope > LEAK_DEVIATIONS * error else 0.0


def _steps(measurement: Measurement) -> int:
    return min((len(rank.long_run.step_seconds) for rank in measurement.ranks if rank.long_run is not None), default=0)


def _step_seconds(run: Measurement) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Each step as long as on its slowest rank."""
    ranks = [rank.long_run.step_seconds for rank in run.ranks if rank.long_run is not None]
    slowest: np.ndarray[tuple[int], np.dtype[np.float64]] = np.array(ranks, float).max(axis=0)
    return slowest


def _deviations(contenders: Sequence[Sequence[Measurement]]) -> tuple[list[float], int]:
    """Standard error of the logarithm of each contender's throughput, and the degrees of freedom of all of them."""
    logs = np.log([[run.step_time_seconds for run in runs] for runs in contenders])
    rest_of_runs = logs - logs.mean(axis=1, keepdims=True)
    degrees = logs.shape[1] - 1
    if len(contenders) > 1:
        rest_of_runs -= rest_of_runs.mean(axis=0)
        degrees *= len(contenders) - 1
    between = float((rest_of_runs**2).sum()) / max(1, degrees)
    found = []
    for runs in contenders:
        steps = [_step_seconds(run) / run.step_time_seconds - 1 for run in runs]
        rest, count = sum(float(s @ s) for s in steps), sum(len(s) - 1 for s in steps)
        within = rest / max(1, count) / min(len(s) for s in steps)
        found.append(float(np.sqrt(max(between, within) / len(runs))))
    return found, degrees


def _interval(estimate: float, deviation: float, degrees: int) -> Interval:
    width = float(np.exp(stdtrit(max(1, degrees), 0.5 + CONFIDENCE / 2) * deviation))
    return Interval(estimate, estimate / width, estimate * width)


def _rank_lower_bound(rank: RankMeasurement, accumulation: int) -> float:
    """Of the throughput that the rank's samples give, the share that they show at least (0..1)."""
    kinds = [(1, rank.update_step_seconds)]
    kinds += [(accumulation - 1, rank.micro_step_seconds)] if accumulation > 1 and rank.micro_step_seconds else []
    ratios = [seconds / statistics.fmean(samples) - 1 for _, samples in kinds for seconds in samples]
    degrees = len(ratios) - len(kinds)
    if degrees < 1:
        return 0.0
    deviation = (sum(ratio**2 for ratio in ratios) / degrees) ** 0.5
    parts = [weight * statistics.fmean(samples) for weight, samples in kinds]
    errors = [part * deviation / len(samples) ** 0.5 for part, (_, samples) in zip(parts, kinds, strict=True)]
    quantile = float(stdtrit(degrees, 0.5 + SCREENING_CONFIDENCE / 2))
    return float(1 / (1 + quantile * math.hypot(*errors) / sum(parts)))
