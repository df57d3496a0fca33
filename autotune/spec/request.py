"""`TrialRequest`: all that a worker needs to run one trial, in one picklable value."""

import math
from dataclasses import dataclass, field
from typing import Literal

from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.script import ScriptRun
from autotune.spec.workload import LongRunSettings, MeasureSettings, Workload

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """One trial. Two equal requests do the same work on the same data."""

    trial_id: str
    """Unique among the trials that run at one time; names the log files."""
    model: ModelSpec
    workload: Workload
    config: TrialConfig
    device: DeviceType
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    long_run: LongRunSettings | None = None
    """Measure whole optimizer steps instead, to confirm the config; None: screen it."""
    most_step_seconds: float | None = None
    """A trial whose optimizer step surely takes longer is ended early; None: none is."""
    memory_limit_bytes: int | None = None
    """CPU only: live tensor bytes a rank may hold before it runs out of memory."""
    timeout_seconds: float = 600.0
    """From the start of the processes to the last result; then the whole gang is killed."""
    stall_seconds: float = 120.0
    """Without a sign of progress from any rank for this long, the trial is a hang."""
    nvme_path: str | None = None
    """Folder on a fast disk of each node; a rank is given one of its own in it. None: nothing is offloaded there."""
    script: ScriptRun | None = None
    """The user's own training script, which then runs the config in our engines' place."""

    @property
    def accumulation(self) -> int:
        """Micro-steps of an optimizer step as the trial runs it.

        Our engines are told which micro-step ends one. A script is told how many there are, and to screen a config few
        enough that two steps of them are all samples that are asked for, unless it reports nothing but whole steps.
        """
        steps = self.workload.micro_steps(self.config)
        if self.script is None or self.script.accumulation == "whole" or self.long_run is not None:
            return steps
        return min(steps, math.ceil(max(self.measure.micro_steps, 3) / 2))

    @property
    def timed_micro_steps(self) -> int:
        """Micro-steps of which an optimizer step's time is put together: one where whole steps are timed."""
        whole = self.script is not None and self.script.accumulation == "whole"
        return 1 if whole else self.workload.micro_steps(self.config)
