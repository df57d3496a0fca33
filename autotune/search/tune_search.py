"""`TuneSearch`: the `OptunaSearch` that Ray Tune drives. It feeds the study and teaches the sampler.

Ray Tune asks `suggest` for the next trial and reports its end to `on_trial_complete`; the study in between decides
what really runs and stores what came of it.
"""

import dataclasses
import json
import random
from typing import Any, Protocol, runtime_checkable

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from autotune.confirmation import ROUNDS
from autotune.results import UNSTABLE
from autotune.search.distributions import distributions
from autotune.search.expected_improvement import Proposal
from autotune.space.space import NOT_APPLICABLE
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome, Phase, outcome_from_dict
from autotune.study import Attempt, Study

OBJECTIVE = "objective"
MEMORY_CONSTRAINT = "memory"
PATIENCE = 3.0
"""How many times as long as by its screening a run that confirms may take for its steps."""
HOPELESS = 1.25
"""A trial whose optimizer step surely takes longer than that of the best so far, by this factor at equal tokens per
GPU, is ended early."""
MAX_REDRAWS = 20
"""Illegal, known or too big proposals that are redrawn before any untried candidate is taken at random."""


@runtime_checkable
class Explains(Protocol):
    """A sampler that says what it expects of its last proposal; `PlanSampler` does."""

    proposal: Proposal | None


def order(attempt: Attempt, study: Study) -> dict[str, Any]:
    """An attempt as Ray Tune hands it to the trainable."""
    space = study.space
    found: dict[str, Any] = {"attempt": attempt.id, "trial": attempt.trial, "config": attempt.config.to_dict()}
    if attempt.turn is not None:
        measure, first = space.file.measure, attempt.turn.round == 1
        steps = -(-measure.confirm_steps // ROUNDS)
        found["long_run"] = {"steps": steps, "evaluate": first, "save": first and measure.confirm_checkpoint}
        # Whole steps of a slow baseline take longer than any trial may.
        expected = (steps + 1) * (attempt.expected_step_seconds or 0.0)
        found["more_seconds"] = PATIENCE * expected
    elif attempt.source == "baseline" or space.file.objective.minimize is not None:
        pass  # a slow trial may be what needs least memory
    elif (best := study.best()) is not None:
        tokens = space.workload.tokens_per_step(attempt.config) / attempt.config.gpus
        found["most_step_seconds"] = HOPELESS * tokens / best.measurement.tokens_per_second_per_gpu
    return found


class TuneSearch(OptunaSearch):  # type: ignore[misc] # Ray ships no types
    """Proposes candidates of one study and records their outcomes.

    Nothing of it is saved by Ray: the store is the truth, and a restarted study rebuilds the in-memory Optuna study
    from it (a restored searcher and a database disagree after a crash).
    """

    def __init__(self, study: Study, sampler: optuna.samplers.BaseSampler, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study, self._chooser = study, sampler
        self._tune_space = study.space
        self._attempts: dict[str, Attempt] = {}
        self._drawn: optuna.Trial | None = None
        self._random = random.Random(seed)
        # Optuna refuses an empty space, and a space without choice needs no sampler: one candidate is left to run.
        searched = distributions(study.space) or {"engine": CategoricalDistribution(study.space.axes["engine"])}
        super().__init__(space=searched, metric=OBJECTIVE, mode="max", sampler=sampler)
        self._distributions = searched
        if not isinstance(sampler, Explains):  # which reads the study itself
            worst = self._worst()
            for _, config, outcome in study.results:
                self._add_finished(config, *self._lesson(outcome, worst))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial for Ray Tune; None while it may ask again later, `FINISHED` at the study's end.

        When nothing is left to screen, what leads is confirmed, one run after the other.
        """
        self._drawn = None
        attempt = self._study.next_attempt(self._propose)
        if attempt is None and self._attempts:
            return None  # A running trial may yet have to be run again.
        if attempt is not None:
            self._register(trial_id, attempt.config)
        else:
            attempt = self._study.next_confirmation()
        if attempt is None:
            return str(Searcher.FINISHED)
        self._attempts[trial_id] = attempt
        return order(attempt, self._study)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a trial reports once, at its end."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the outcome, then teach the sampler what it says about the config."""
        attempt = self._attempts.pop(trial_id, None)
        if attempt is None:
            return
        if result and "outcome" in result:
            outcome = outcome_from_dict(json.loads(result["outcome"]))
        else:
            message = "the process that drove the trial ended without a result"
            outcome = Failure(kind=FailureKind.WORKER_LOST, phase=Phase.START, message=message)
        self._study.record(attempt, outcome)
        trial = self._ot_trials.pop(trial_id, None)
        if trial is None:
            return
        value, violation = self._lesson(outcome, self._worst())
        if value is None or not self._study.settled(attempt.config):
            self._ot_study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint(MEMORY_CONSTRAINT, violation)
        self._ot_study.tell(trial, value)

    def interrupt(self, reason: str) -> None:
        """Record every running attempt as interrupted; it is run again when the study is resumed."""
        for attempt in self._attempts.values():
            self._study.record(attempt, Failure(kind=FailureKind.INTERRUPTED, phase=Phase.START, message=reason))
        self._attempts.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray pickles its experiment at start, with a database connection in it if it could."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing is saved, see the class."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing is saved, see the class."""

    def _propose(self) -> TrialConfig | None:
        for _ in range(MAX_REDRAWS):
            trial = self._ot_study.ask(self._distributions)
            proposal = self._chooser.proposal if isinstance(self._chooser, Explains) else None
            if proposal is not None and self._study.stop_at(proposal.expected_gain):
                self._ot_study.tell(trial, state=TrialState.FAIL)
                return None
            config = self._config(trial.params)
            if self._is_new(config):
                self._drawn = trial
                if proposal is not None:
                    self._study.explain(config, dataclasses.asdict(proposal))
                return config
            # FAIL is the one state that no sampler learns from.
            self._ot_study.tell(trial, state=TrialState.FAIL)
        left = self._study.worth_a_launch
        # One more than the study knows: among so many there is an untried one, if there is any at all.
        drawn = self._random.sample(range(len(left)), min(len(left), self._study.known_count + 1))
        configs = (self._tune_space.candidates[int(left[at])] for at in drawn)
        return next((config for config in configs if not self._study.known(config)), None)

    def _is_new(self, config: TrialConfig) -> bool:
        """Whether a proposal is legal, was not run yet, and may fit."""
        study = self._study
        return not study.known(config) and self._tune_space.refusal(config) is None and study.is_worth_a_launch(config)

    def _config(self, params: dict[str, Any]) -> TrialConfig:
        values = {axis: allowed[0] for axis, allowed in self._tune_space.axes.items()}
        return self._tune_space.config(values | {a: v for a, v in params.items() if v != NOT_APPLICABLE})

    def _params(self, config: TrialConfig) -> dict[str, Any] | None:
        """The config in Optuna's terms; None when it lies outside the axes, as a baseline may."""
        if config not in self._tune_space:
            return None
        values = self._tune_space.values(config)
        return {axis: values[axis] for axis in self._distributions}

    def _register(self, trial_id: str, config: TrialConfig) -> None:
        """Give Optuna a running trial with the config's own parameters, `n/a` where an axis does not apply."""
        params = self._params(config)
        drawn, self._drawn = self._drawn, None
        if drawn is not None and drawn.params == params:
            self._ot_trials[trial_id] = drawn
            return
        if drawn is not None:
            self._ot_study.tell(drawn, state=TrialState.FAIL)
        if params is not None:
            self._ot_study.enqueue_trial(params)
            self._ot_trials[trial_id] = self._ot_study.ask(self._distributions)

    def _add_finished(self, config: TrialConfig, value: float | None, violation: float) -> None:
        params = self._params(config)
        if value is None or params is None:
            return
        self._ot_study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE,
                value=value,
                params=params,
                distributions=dict(self._distributions),
                constraints={MEMORY_CONSTRAINT: violation},
            )
        )

    def _worst(self) -> float:
        """Tokens per second and GPU of the slowest eligible trial; 0.0 where there is none."""
        feasible = [o for _, _, o in self._study.results if isinstance(o, Measurement) and self._study.eligible(o)]
        return min((o.tokens_per_second_per_gpu for o in feasible), default=0.0)

    def _lesson(self, outcome: Outcome, worst: float) -> tuple[float | None, float]:
        """(objective, constraint violation) as Optuna is told; objective None teaches nothing.

        A config that cannot run is COMPLETE with the worst feasible value and a positive violation: Optuna's samplers
        ignore FAIL, and its Gaussian process ignores PRUNED.
        """
        if isinstance(outcome, Measurement):
            usable = (1 - self._tune_space.file.memory_headroom) * outcome.device_memory_bytes
            over = outcome.peak_device_used_bytes / usable - 1
            return outcome.tokens_per_second_per_gpu, over if self._study.eligible(outcome) else max(over, 0.01)
        if outcome.kind.is_infeasible:
            return worst, 1.0
        if outcome.kind in UNSTABLE:
            return worst, 0.5
        if outcome.kind is FailureKind.TIMEOUT:
            return worst, 0.0
        if outcome.kind is FailureKind.STOPPED_EARLY:
            over = (outcome.peak_device_used_bytes or 0) / self._tune_space.usable_bytes - 1
            return outcome.most_tokens_per_second_per_gpu, over
        return None, 0.0
