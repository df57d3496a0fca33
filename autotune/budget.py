"""`Spending`: what a study may spend, minutes and GPU-hours, and what it has spent. The number of trials is its own.

Limits are hard: nothing is started once one is reached, and screening stops early enough that confirming those who lead
is paid for. What runs then runs to its end, so that GPU-hours are exceeded by running trials alone.
"""

import time
from collections.abc import Iterable

from autotune.confirmation import confirmation_seconds
from autotune.results import Result, Use, use_of
from autotune.space.file import BudgetFile
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Measurement, Outcome

MOST_RESERVED = 0.5
"""Share of the budget that screening leaves to confirmation, at most."""


class Spending:
    """Counts what attempts hold. Time is this process', GPU-seconds are over all runs of the study.

    Args:
        budget: the limits.
        total_gpus: of the cluster.
    """

    def __init__(self, budget: BudgetFile, total_gpus: int) -> None:
        self._budget, self._total_gpus = budget, total_gpus
        self._started = time.monotonic()
        self._running: dict[int, tuple[float, int]] = {}
        self.gpu_seconds_by_use = dict.fromkeys(Use, 0.0)
        """GPUs x seconds that finished attempts held."""

    def begin(self, attempt_id: int, gpus: int) -> None:
        """An attempt holds GPUs from now on."""
        self._running[attempt_id] = time.monotonic(), gpus

    def held_seconds(self, attempt_id: int) -> float:
        """For how long a running attempt has held them."""
        since, _ = self._running[attempt_id]
        return time.monotonic() - since

    def end(self, attempt_id: int, config: TrialConfig, outcome: Outcome, *, confirming: bool) -> None:
        """It does not any more."""
        del self._running[attempt_id]
        self.charge(config, outcome, confirming=confirming)

    def charge(self, config: TrialConfig, outcome: Outcome, *, confirming: bool) -> None:
        """Count what a finished attempt held."""
        self.gpu_seconds_by_use[use_of(outcome, confirming=confirming)] += outcome.elapsed_seconds * config.gpus

    @property
    def elapsed_seconds(self) -> float:
        """Since this process opened the study."""
        return time.monotonic() - self._started

    @property
    def gpu_seconds(self) -> float:
        """GPUs x seconds that attempts held, those included that run now."""
        now = time.monotonic()
        held = [(now - since, gpus) for since, gpus in self._running.values()]
        # Of several that run, some may wait for their GPUs; together they hold no more than there are.
        longest = max((seconds for seconds, _ in held), default=0.0)
        running = min(sum(seconds * gpus for seconds, gpus in held), longest * self._total_gpus)
        return sum(self.gpu_seconds_by_use.values()) + running

    def spent(self, reserved_seconds: float = 0.0, reserved_gpu_seconds: float = 0.0) -> str | None:
        """Which of minutes and GPU-hours is spent, with what is reserved; None: neither."""
        budget = self._budget
        if budget.minutes is not None and self.elapsed_seconds + reserved_seconds >= budget.minutes * 60:
            return f"{budget.minutes:g} minutes"
        if budget.gpu_hours is not None and self.gpu_seconds + reserved_gpu_seconds >= budget.gpu_hours * 3600:
            return f"{budget.gpu_hours:g} GPU-hours"
        return None

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit on minutes or GPU-hours."""
        return self._budget.minutes is not None or self._budget.gpu_hours is not None

    def confirmation_cost(self, contenders: Iterable[Result], steps: int) -> tuple[float, float]:
        """Seconds and GPU-seconds that confirming these over so many steps will take, at most a share of the budget."""
        seconds = gpu_seconds = 0.0
        for _, config, outcome in contenders:
            if isinstance(outcome, Measurement):
                took = confirmation_seconds(outcome, steps)
                seconds, gpu_seconds = seconds + took, gpu_seconds + took * config.gpus
        return (
            min(seconds, MOST_RESERVED * 60 * (self._budget.minutes or 0)),
            min(gpu_seconds, MOST_RESERVED * 3600 * (self._budget.gpu_hours or 0)),
        )
