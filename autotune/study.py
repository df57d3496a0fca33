"""The loop of a study: propose, run, record, confirm. It knows no torch, no SQL, no Ray and no HTML.

A runner (`autotune.search.runner`) pulls attempts with `next_attempt` and pushes outcomes with `record`; the study
decides what is run next, what is run again, when the budget is spent, and which config is the best. All of it is
rebuilt from the store, which is the only truth: kill the process at any moment and open the study again.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autotune.budget import Spending
from autotune.confirmation import Confirmation, Run, Verdict, contenders
from autotune.errors import StoreError
from autotune.results import (
    Best,
    Counts,
    Ledger,
    Result,
    attempted_outcomes,
    count,
    eligible,
    ended_outcome,
    fastest,
    ledger,
    must_run_alone,
    pareto_front,
    standing_outcome,
)
from autotune.space.space import Space, stored_space
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome
from autotune.spec.prediction import Prediction
from autotune.spec.record import AttemptState, SpaceRecord, StudyRecord, TrialRecord, Turn
from autotune.spec.sensitivity import Sensitivity


class Store(Protocol):
    """What a study needs of its database. Every call is one transaction."""

    def study(self, name: str) -> StudyRecord | None:
        """The study, or None."""

    def create_study(self, name: str, space: SpaceRecord, identity: str) -> StudyRecord:
        """Add a study."""

    def add_space(self, name: str, space: SpaceRecord) -> int:
        """Keep the edited search space as the study's next version."""

    def keep_sensitivity(self, name: str, sensitivity: Sensitivity) -> None:
        """Keep what was found about the winner."""

    def trials(self, study: str) -> list[TrialRecord]:
        """Every trial with its attempts, by number."""

    def begin_attempt(
        self,
        study: str,
        config: TrialConfig,
        source: str,
        prediction: Prediction | None = None,
        turn: Turn | None = None,
    ) -> tuple[int, int]:
        """Record that an attempt starts, and what is expected of it; returns (trial number, attempt id)."""

    def finish_attempt(self, attempt_id: int, outcome: Outcome) -> None:
        """Record how it ended."""

    def interrupt_running(self, study: str) -> int:
        """Mark attempts that a dead driver left running; returns how many."""


class Forecast(Protocol):
    """What a study knows of its candidates before they run; `autotune.predict.plan.Plan` is one."""

    @property
    def surely_too_big(self) -> NDArray[np.bool_]:
        """(candidates,), in their order: which would teach nothing, since they do not fit."""

    def of(self, config: TrialConfig) -> Prediction | None:
        """What is predicted of a config; None where nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One run of one config."""

    id: int
    trial: int
    config: TrialConfig
    source: str
    turn: Turn | None = None
    """Which run of which confirmation it is; None of one that screens."""
    expected_step_seconds: float | None = None
    """Of an optimizer step, by its screening; None where that is not known."""


class Observer(Protocol):
    """Hears what happens, in the driver's process and order."""

    def started(self, attempt: Attempt) -> None:
        """An attempt was handed to the runner."""

    def finished(self, attempt: Attempt, outcome: Outcome) -> None:
        """Its outcome is in the store."""


class Study:
    """One study on one store: `Study.open` to run it, `Study.stored` to read it.

    What an edit of the file has put outside the axes stays in the store, but it neither wins nor counts as a trial of
    the budget. Not thread-safe: one runner drives it.
    """

    def __init__(self, space: Space, store: Store, trials: list[TrialRecord], forecast: Forecast | None = None) -> None:
        self.space = space
        self.forecast = forecast
        self.observers: list[Observer] = []
        self._store = store
        self._outcomes: dict[TrialConfig, list[Outcome]] = {}
        self._numbers: dict[TrialConfig, int] = {}
        self._sources: dict[TrialConfig, str] = {}
        self._predictions: dict[TrialConfig, Prediction] = {}
        self._running: dict[int, Attempt] = {}
        self._again: deque[TrialConfig] = deque()
        self._outside: set[TrialConfig] = set()
        self._confirming: list[Run] = []
        self._screened: str | None = None
        self._verdict: tuple[tuple[int, int], Verdict | None] | None = None
        self._results: tuple[Result, ...] | None = None
        self.spending = Spending(space.file.budget, space.cluster.total_gpus)
        self._enough: str | None = None
        self._sensitivity = None if (record := store.study(space.name)) is None else record.sensitivity
        baseline = space.baseline
        for trial in trials:
            self._numbers[trial.config], self._sources[trial.config] = trial.number, trial.source
            if trial.prediction is not None:
                self._predictions[trial.config] = trial.prediction
            self._outcomes[trial.config] = attempted_outcomes(trial)
            self._confirming += [
                Run(trial.number, attempt.turn, ended_outcome(attempt))
                for attempt in trial.attempts
                if attempt.turn is not None and attempt.state is not AttemptState.RUNNING
            ]
            for attempt in trial.attempts:
                if attempt.state is not AttemptState.RUNNING:
                    confirming = attempt.turn is not None
                    self.spending.charge(trial.config, ended_outcome(attempt), confirming=confirming)
            if trial.config not in space and trial.config != baseline:
                self._outside.add(trial.config)
            elif not self.settled(trial.config):
                self._again.append(trial.config)
        if baseline is not None and baseline not in self._outcomes:
            self._again.appendleft(baseline)

    @classmethod
    def open(cls, space: Space, store: Store, forecast: Forecast | None = None) -> "Study":
        """Create the study, or take up the one of that name where it stopped.

        Args:
            space: what is searched.
            store: where it is kept.
            forecast: what is predicted of its candidates; without one, each is worth a launch.

        Raises:
            StoreError: a study of that name measured another model, workload or cluster.
        """
        known = store.study(space.name)
        if known is None:
            store.create_study(space.name, space.record, space.identity)
        elif known.identity != space.identity:
            raise StoreError(
                f"study {space.name!r} in this store measured another model, workload, cluster or protocol than "
                f"{space.where} describes; give the file another study name"
            )
        elif known.space != space.record:
            store.add_space(space.name, space.record)
        store.interrupt_running(space.name)
        return cls(space, store, store.trials(space.name), forecast)

    @classmethod
    def stored(cls, store: Store, name: str) -> "Study":
        """The study as its store has it. Nothing is written, so it may be running elsewhere meanwhile.

        Raises:
            StoreError: there is no such study, or it was stored by a version that kept too little.
        """
        trials = store.trials(name)
        record = store.study(name)
        assert record is not None  # `trials` raises for an unknown study
        return cls(stored_space(record), store, trials)

    # What to run

    def next_attempt(self, propose: Callable[[], TrialConfig | None]) -> Attempt | None:
        """Begin the next attempt: what must be run again, then the baseline, then what `propose` says.

        Args:
            propose: returns a legal config that this study has not run, or None when there is none left.

        Returns:
            None when the budget is spent, nothing is left to run, or a trial that must run alone runs or waits for
            the others to end.
        """
        if self.stop_reason is not None:
            return None
        alone = [attempt.config for attempt in self._running.values()] + list(self._again)[:1]
        if self._running and any(must_run_alone(self._outcomes.get(config, [])) for config in alone):
            return None
        config = self._again.popleft() if self._again else propose()
        if config is None:
            return None
        source = self._sources.setdefault(config, "baseline" if config == self.space.baseline else "search")
        if config not in self._numbers and config not in self._predictions and self.forecast is not None:
            prediction = self.forecast.of(config)
            if prediction is not None:
                self._predictions[config] = prediction
        number, attempt_id = self._store.begin_attempt(self.space.name, config, source, self._predictions.get(config))
        self._numbers[config] = number
        self._outcomes.setdefault(config, [])
        attempt = Attempt(id=attempt_id, trial=number, config=config, source=source)
        return self._begin(attempt)

    def next_confirmation(self) -> Attempt | None:
        """Begin the next run that confirms, once the screening is over and nothing runs.

        Nothing is screened any more afterwards, so that runs are compared that were made one after the other.

        Returns:
            None when everything is confirmed, the budget is spent, or something runs still.
        """
        if self._running or self.spent is not None or (found := self._confirmation()) is None or found.next is None:
            return None
        self._screened = self.stop_reason or "no candidate is left"
        contender, turn = found.next
        config, screened = contender.config, contender.outcome
        _, attempt_id = self._store.begin_attempt(self.space.name, config, self._sources[config], turn=turn)
        attempt = Attempt(
            id=attempt_id,
            trial=contender.trial,
            config=config,
            source=self._sources[config],
            turn=turn,
            expected_step_seconds=screened.step_time_seconds if isinstance(screened, Measurement) else None,
        )
        return self._begin(attempt)

    def _begin(self, attempt: Attempt) -> Attempt:
        self._running[attempt.id] = attempt
        self.spending.begin(attempt.id, attempt.config.gpus)
        for observer in self.observers:
            observer.started(attempt)
        return attempt

    def stop_at(self, expected_gain: float | None) -> bool:
        """Whether another trial is not worth its GPUs, by what the sampler expects of the best one, as a ratio.

        It is believed once `stop_after` trials are finished: a posterior that has seen few is surer than it should be.
        Then nothing more is screened by this process.
        """
        budget = self.space.file.budget
        if expected_gain is None or self.counts.finished < budget.stop_after:
            return False
        if expected_gain < budget.stop_below_gain and not self._running:
            self._enough = (
                f"another trial promises a gain of {expected_gain:.2%}, less than {budget.stop_below_gain:.2%}"
            )
        return expected_gain < budget.stop_below_gain

    def explain(self, config: TrialConfig, proposal: dict[str, float | int | None]) -> None:
        """Keep why a config that is about to run was proposed, with its prediction, if it has one."""
        if self.forecast is not None and config not in self._numbers:
            prediction = self.forecast.of(config)
            if prediction is not None:
                self._predictions[config] = replace(prediction, proposal=proposal)

    def record(self, attempt: Attempt, outcome: Outcome) -> None:
        """Store how an attempt ended and decide whether its config is run again."""
        if isinstance(outcome, Failure) and outcome.kind is FailureKind.INTERRUPTED and not outcome.elapsed_seconds:
            outcome = replace(outcome, elapsed_seconds=self.spending.held_seconds(attempt.id))
        self._store.finish_attempt(attempt.id, outcome)
        del self._running[attempt.id]
        self.spending.end(attempt.id, attempt.config, outcome, confirming=attempt.turn is not None)
        if attempt.turn is not None:
            self._confirming.append(Run(attempt.trial, attempt.turn, outcome))
        else:
            self._outcomes[attempt.config].append(outcome)
            self._results = None
            if not self.settled(attempt.config):
                self._again.append(attempt.config)
        for observer in self.observers:
            observer.finished(attempt, outcome)

    def known(self, config: TrialConfig) -> bool:
        """Whether the config was run, runs, or waits to be run again."""
        return config in self._outcomes or config in self._again

    @property
    def unsettled(self) -> list[TrialConfig]:
        """Configs that are screened now, or wait to be screened again."""
        return self._being_screened + list(self._again)

    @property
    def known_count(self) -> int:
        """How many configs `known` knows, at most."""
        return len(self._outcomes) + len(self._again)

    @cached_property
    def worth_a_launch(self) -> NDArray[np.int64]:
        """Indexes of the candidates that are not surely too big."""
        if self.forecast is None:
            return np.arange(len(self.space.candidates))
        return np.flatnonzero(~self.forecast.surely_too_big)

    def is_worth_a_launch(self, config: TrialConfig) -> bool:
        """Whether a candidate is one of them."""
        return self.forecast is None or not self.forecast.surely_too_big[self.space.candidates.index(config)]

    @property
    def stop_reason(self) -> str | None:
        """Why nothing more may be screened, or None. Enough of minutes and GPU-hours is left to confirm the winner."""
        budget, measure = self.space.file.budget, self.space.file.measure
        if self.counts.finished + len(self._being_screened) >= budget.trials:
            return f"{budget.trials} trials"
        if (reason := self._screened or self._enough or self.spent) is not None or not self.spending.is_limited:
            return reason
        return self.spending.spent(*self.spending.confirmation_cost(self._contenders(), measure.confirm_steps))

    @property
    def spent(self) -> str | None:
        """Which of minutes and GPU-hours is spent, so that nothing at all may be started; None: neither."""
        return self.spending.spent()

    @property
    def finished(self) -> bool:
        """Whether neither anything more is to be screened, for want of budget, nor anything to be confirmed."""
        if self.stop_reason is None:
            return False
        return self.spent is not None or (found := self._confirmation()) is None or found.next is None

    @property
    def _being_screened(self) -> list[TrialConfig]:
        return [attempt.config for attempt in self._running.values() if attempt.turn is None]

    def _contenders(self) -> list[Result]:
        file = self.space.file
        steps = self.space.workload.micro_steps
        return contenders(self.results, self.space.baseline, file.measure.confirm_top, file.memory_headroom, steps)

    def _confirmation(self) -> Confirmation | None:
        """The confirmation as it stands; None where the file wants none."""
        file = self.space.file
        if not file.measure.confirm_top:
            return None
        return Confirmation(
            self.results,
            self._confirming,
            baseline=self.space.baseline,
            top=file.measure.confirm_top,
            steps=file.measure.confirm_steps,
            headroom=file.memory_headroom,
            accumulation=self.space.workload.micro_steps,
        )

    # What is known

    @property
    def results(self) -> tuple[Result, ...]:
        """Every trial of the current axes whose outcome stands, by number."""
        if self._results is None:
            inside = ((config, outcomes) for config, outcomes in self._outcomes.items() if config not in self._outside)
            standing = ((self._numbers[config], config, standing_outcome(outcomes)) for config, outcomes in inside)
            found = (Result(number, config, outcome) for number, config, outcome in standing if outcome is not None)
            self._results = tuple(sorted(found, key=lambda result: result.trial))
        return self._results

    @property
    def ledger(self) -> Ledger:
        """Predicted and measured memory of the trials that have both."""
        return ledger(self.results, self._predictions, self.space.usable_bytes)

    def prediction(self, config: TrialConfig) -> Prediction | None:
        """What was predicted of a trial before it ran; None where nothing was."""
        return self._predictions.get(config)

    @property
    def counts(self) -> Counts:
        """Trials by state."""
        running = {attempt.config for attempt in self._running.values()}
        waiting = [config for config in self._again if self._outcomes.get(config) and config not in running]
        return count((result.outcome for result in self.results), interrupted=len(waiting), running=len(running))

    @property
    def outside(self) -> frozenset[TrialConfig]:
        """Configs that were run before an edit of the file put them outside the axes."""
        return frozenset(self._outside)

    def eligible(self, measurement: Measurement) -> bool:
        """Whether a measurement left the memory headroom that the file asks for."""
        return eligible(measurement, self.space.file.memory_headroom)

    @property
    def verdict(self) -> Verdict | None:
        """What the confirmation of those who lead now says; None until all of its runs are made."""
        key = len(self._confirming), sum(map(len, self._outcomes.values()))
        if not self._confirming:
            return None
        if self._verdict is None or self._verdict[0] != key:
            found = self._confirmation()
            self._verdict = key, None if found is None else found.verdict
        return self._verdict[1]

    def best(self) -> Best | None:
        """The confirmed winner; before there is one, the fastest eligible trial of the screening."""
        verdict = self.verdict
        if verdict is None:
            return fastest(self.results, self.space.file.memory_headroom)
        winner = verdict.winner
        return None if winner is None else Best(winner.trial, winner.config, winner.measurement)

    @property
    def pareto_front(self) -> list[Best]:
        """The eligible trials that trade throughput for peak memory best, the fastest first; by confirmed figures where
        there are any.
        """
        measured = [
            Best(trial, config, outcome)
            for trial, config, outcome in self.results
            if isinstance(outcome, Measurement) and self.eligible(outcome)
        ]
        return pareto_front(self._confirmed(best) for best in measured)

    def _confirmed(self, best: Best) -> Best:
        found = None if self.verdict is None else self.verdict.of(best.trial)
        return best if found is None else best._replace(measurement=found.measurement)

    @property
    def sensitivity(self) -> Sensitivity | None:
        """Of the winner; None where there is none, or nobody has looked since it became the winner."""
        found, best = self._sensitivity, self.best()
        if found is None or best is None or (found.trial, found.trials) != (best.trial, self.counts.finished):
            return None
        return found

    def keep_sensitivity(self, found: Sensitivity) -> None:
        """Keep what one step away from the winner does."""
        self._store.keep_sensitivity(self.space.name, found)
        self._sensitivity = found

    def best_among(self, results: Iterable[Result]) -> Best | None:
        """The fastest eligible trial of some, by screening; its figures are confirmed ones if there are any."""
        best = fastest(results, self.space.file.memory_headroom)
        return None if best is None else self._confirmed(best)

    @property
    def baseline_outcome(self) -> Outcome | None:
        """How the baseline ended; None without one or before it ran."""
        baseline = self.space.baseline
        return next((outcome for _, config, outcome in self.results if config == baseline), None)

    def settled(self, config: TrialConfig) -> bool:
        """Whether the config's last outcome stands; False while it must be run again."""
        return standing_outcome(self._outcomes[config]) is not None
