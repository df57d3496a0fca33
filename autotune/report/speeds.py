"""How fast candidates of a plan should be, how sure that is, and what the study and its winner cost."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from autotune.predict.plan import Plan
from autotune.search.columns import candidates_of
from autotune.search.expected_improvement import ExpectedImprovement
from autotune.space.space import Space
from autotune.units import format_rate

COVERAGE = 0.8
UNCALIBRATED = (
    f"Nothing was measured on this cluster yet: {COVERAGE:.0%} of the trials should come out within these ranges. The"
    " order is surer than the figures, and each trial of `tune` narrows them."
)
"""Whether they do is measured: `benchmarks/time_cpu.py`, and `foreign.py --only time`."""


class Speeds:
    """Of some candidates of a plan whose times are known.

    Args:
        plan: with times.
        indexes: the candidates.
    """

    def __init__(self, plan: Plan, indexes: Sequence[int]) -> None:
        assert plan.times is not None
        self._plan, self._places = plan, {at: place for place, at in enumerate(indexes)}
        self._low, self._high = np.zeros(0), np.zeros(0)
        if indexes:
            with threadpool_limits(limits=1, user_api="blas"):
                expected = ExpectedImprovement(candidates_of(plan, np.array(indexes))).expect([])
            self._low, self._high = expected.throughput_between(COVERAGE)
        self.peaked = not np.isnan(plan.times.peak_flops).any()
        """Whether the hardware's peak is known, and with it the share that is reached."""
        self._price = plan.space.file.price_per_gpu_hour

    @property
    def titles(self) -> list[str]:
        """Of a table's columns."""
        return [
            "tokens/s/GPU",
            f"{COVERAGE:.0%} within",
            *(["of peak"] if self.peaked else []),
            *(["per million tokens"] if self._price is not None else []),
        ]

    def cells(self, at: int) -> list[str]:
        """A row of that table."""
        found = self.document(at)
        low, high = found["tokens_per_second_per_gpu_80%"]
        rate = found["tokens_per_second_per_gpu"]
        words = [format_rate(_rounded(rate, 3)), f"{format_rate(_rounded(low, 2))}-{format_rate(_rounded(high, 2))}"]
        words += [f"{found['model_flops_utilization']:.0%}"] if self.peaked else []
        words += [f"{found['cost_per_million_tokens']:.3g}"] if self._price is not None else []
        return words

    def document(self, at: int) -> dict[str, Any]:
        """The same as plain JSON data."""
        assert self._plan.times is not None
        time, place = self._plan.times.at(at), self._places[at]
        rate, utilization = time.tokens_per_second_per_gpu, time.model_flops_utilization
        return {
            "tokens_per_second_per_gpu": round(rate, 1),
            "tokens_per_second_per_gpu_80%": [round(float(self._low[place]), 1), round(float(self._high[place]), 1)],
            "step_time_seconds": round(time.step_time_seconds, 4),
            "model_flops_utilization": None if math.isnan(utilization) else round(utilization, 4),
            "cost_per_million_tokens": cost_per_million_tokens(self._plan.space, rate),
        }


def cost_per_million_tokens(space: Space, tokens_per_second_per_gpu: float) -> float | None:
    """In the currency of the file's price of a GPU-hour; None without one."""
    price = space.file.price_per_gpu_hour
    return None if price is None else round(price / 3600 / tokens_per_second_per_gpu * 1e6, 6)


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def budget_gpu_hours(space: Space) -> float:
    """GPU-hours that the study can take at most: each trial its full time, or what the file states."""
    budget = space.file.budget
    trials = min(budget.trials, len(space.candidates))
    most = trials * budget.trial_seconds * max(int(gpus) for gpus in space.axes["gpus"]) / 3600
    return round(min(most, budget.gpu_hours or most), 2)


def budget_cost(space: Space) -> float | None:
    """What they cost, in the currency of the file's price; None without one."""
    price = space.file.price_per_gpu_hour
    return None if price is None else round(price * budget_gpu_hours(space), 2)
