"""`TrialRequest`: all that a worker needs to run one trial, in one picklable value."""

from dataclasses import dataclass, field
from typing import Literal

from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
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
