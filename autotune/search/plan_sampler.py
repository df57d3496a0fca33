"""`PlanSampler`: the Optuna sampler that scores every candidate of a plan and proposes the best.

What was predicted is the prior, every outcome of the study corrects it (`autotune.search.expected_improvement`).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from threadpoolctl import ThreadpoolController

from autotune.predict.plan import Plan
from autotune.search.candidates import Observed
from autotune.search.columns import candidates_of
from autotune.search.distributions import distributions
from autotune.search.earlier import Earlier
from autotune.search.expected_improvement import ExpectedImprovement, Proposal
from autotune.search.lessons import observation
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Outcome
from autotune.study import Study


class Expected(NamedTuple):
    """What a trial of one config is expected to show."""

    throughput: float
    """Tokens per second and GPU, median."""
    throughput_low: float
    """With `throughput_high` the interval that holds it with a probability of 80 %."""
    throughput_high: float
    peak_bytes: float
    """Of the device, median."""
    fit_probability: float


class PlanSampler(BaseSampler):
    """Proposes all parameters of a trial jointly, by expected improvement.

    Args:
        study: whose outcomes teach.
        plan: of its space.
        seed: of the random draws that are left where no candidate is.
        earlier: what other studies' trials teach.
    """

    def __init__(self, study: Study, plan: Plan, seed: int, earlier: Earlier | None = None) -> None:
        self._study, self._space = study, plan.space
        self._left = study.worth_a_launch
        trades = plan.space.file.objective.minimize is not None
        candidates, self._earlier = candidates_of(plan, self._left), list[Observed]()
        if earlier is not None:
            candidates, self._earlier = earlier.behind(candidates)
        self._search = ExpectedImprovement(candidates, trade_memory=trades)
        self._timed = plan.times is not None
        self._taught: dict[TrialConfig, Observed | None] = {}
        self._libraries = ThreadpoolController()
        self._random = RandomSampler(seed=seed)
        self.proposal: Proposal | None = None
        """The last one, and why it was made."""

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The axes with a choice, as `TuneSearch` asks for them: nothing is inferred."""
        return dict(distributions(self._space))

    def sample_relative(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the best candidate; none where no candidate is left that may fit."""
        observed, scale = self._lessons()
        pending = [at for config in self._study.unsettled if (at := self._place(config)) is not None]
        # Many small triangular systems: threads would wait for each other longer than they work.
        with self._libraries.limit(limits=1, user_api="blas"):
            proposal = self._search.propose(observed, pending)
        if proposal is None:
            self.proposal = None
            return {}
        self.proposal = replace(
            proposal,
            predicted_throughput=proposal.predicted_throughput * scale,
            throughput=proposal.throughput * scale,
            best_throughput=proposal.best_throughput and proposal.best_throughput * scale,
        )
        values = self._space.values(self._space.candidates[int(self._left[proposal.candidate])])
        return {axis: values[axis] for axis in search_space}

    def expected(self, configs: Iterable[TrialConfig]) -> dict[TrialConfig, Expected]:
        """What the posterior expects of those configs that are worth a launch, whether they were launched or not."""
        places = {config: place for config in configs if (place := self._place(config)) is not None}
        observed, scale = self._lessons()
        with self._libraries.limit(limits=1, user_api="blas"):
            found = self._search.expect(observed, np.array(list(places.values()), np.int64))
        low, high = found.throughput_between()
        columns = (found.throughput * scale, low * scale, high * scale, found.peak_bytes, found.fit_probability)
        return {config: Expected(*row) for config, *row in zip(places, *(c.tolist() for c in columns), strict=True)}

    def _lessons(self) -> tuple[list[Observed], float]:
        """What the study's trials teach, and what their throughputs were divided by.

        Where nothing says how fast candidates are, what was measured says it of all alike.
        """
        lessons = (self._lesson(config, outcome) for _, config, outcome in self._study.results)
        observed = [one for one in lessons if one is not None]
        speeds = [one.throughput for one in observed if one.throughput is not None]
        if self._timed or not speeds:
            return observed + self._earlier, 1.0
        scale = float(np.exp(np.mean(np.log(speeds))))
        scaled = (
            replace(
                one, throughput=one.throughput and one.throughput / scale, at_most=one.at_most and one.at_most / scale
            )
            for one in observed
        )
        return list(scaled), scale

    def _lesson(self, config: TrialConfig, outcome: Outcome) -> Observed | None:
        """What a trial's outcome, which stands, teaches; found out once."""
        if config not in self._taught:
            at = self._place(config)
            self._taught[config] = None if at is None else observation(at, outcome)
        return self._taught[config]

    def _place(self, config: TrialConfig) -> int | None:
        """Where a config is among the candidates that are worth a launch; None for any other."""
        if config not in self._space.candidates:
            return None
        at = self._space.candidates.index(config)
        place = int(np.searchsorted(self._left, at))
        return place if place < len(self._left) and self._left[place] == at else None

    def sample_independent(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """At random: asked only where nothing was proposed."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)
