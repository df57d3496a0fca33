"""`Outcome = Measurement | Failure`: what a trial found out. A half-filled result cannot exist."""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class FailureKind(StrEnum):
    """Why a trial has no measurement."""

    OUT_OF_MEMORY = "out_of_memory"
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    TIMEOUT = "timeout"
    """The deadline passed while the trial still made progress."""
    HANG = "hang"
    """No rank made progress."""
    STOPPED_EARLY = "stopped_early"
    """It could not have become the fastest any more, so it was ended."""
    NON_FINITE_LOSS = "non_finite_loss"
    INVALID_CONFIG = "invalid_config"
    """The library refused the config."""
    CRASH = "crash"
    WORKER_LOST = "worker_lost"
    """A process of ours died for reasons outside the trial."""
    NODE_LOST = "node_lost"
    INTERRUPTED = "interrupted"
    """The study was stopped while the trial ran."""

    @property
    def is_memory(self) -> bool:
        """Memory ran out, on the device or on the host."""
        return self in (FailureKind.OUT_OF_MEMORY, FailureKind.HOST_OUT_OF_MEMORY)

    @property
    def is_infeasible(self) -> bool:
        """The config itself cannot run: the search learns to avoid it."""
        return self.is_memory or self is FailureKind.INVALID_CONFIG


class Phase(StrEnum):
    """Where a trial is, or was when it failed."""

    START = "start"
    """Processes start and find each other."""
    BUILD = "build"
    """The model is built, sharded and given its optimizer."""
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    """Clipping and the optimizer update."""
    EVALUATE = "evaluate"
    """A forward pass without gradients, when a config is confirmed."""
    SAVE = "save"
    """A checkpoint is written, when a config is confirmed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHealth:
    """What the driver (NVML) said of a GPU while whole steps ran, asked after each of them."""

    lowest_clock_mhz: int
    """Of the streaming multiprocessors."""
    highest_clock_mhz: int
    hottest_celsius: int
    throttle_reasons: tuple[str, ...]
    """What held the clock down at some time, such as `sw_power_cap` or `hw_thermal_slowdown`; idleness is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRun:
    """What a rank measures in addition when a config is confirmed: whole optimizer steps, and what a job also does."""

    step_seconds: tuple[float, ...]
    """Whole optimizer steps with all their micro-steps, the first one left out."""
    allocated_bytes: tuple[int, ...]
    """Live tensors after each of those steps."""
    evaluation_seconds: float | None
    """One forward pass without gradients over a micro-batch; None in the rounds that leave it out."""
    checkpoint_seconds: float | None
    """Saving weights and optimizer states; None where none was saved."""
    checkpoint_bytes: int
    """Written on this rank's node. 0 where none was saved."""
    checkpoint_skipped: str | None
    """Why none was saved; None where one was, or in the rounds that leave it out."""
    host: str
    """Name of the machine: rounds are comparable on the same ones."""
    gpu: GpuHealth | None
    """None where there is no NVML."""
    step_tokens: tuple[int, ...] = ()
    """Tokens of each of the steps that this rank trained on, padding left out; empty: as many as the workload says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMeasurement:
    """What one rank measured."""

    rank: int
    micro_step_seconds: tuple[float, ...]
    """Forward and backward passes that only accumulate; empty when nothing is accumulated."""
    update_step_seconds: tuple[float, ...]
    """Forward, backward and optimizer update."""
    losses: tuple[float, ...]
    """Loss of every micro-step that ran, warm-up included, in order."""
    peak_memory_allocated_bytes: int
    """Highest bytes of live tensors since the warm-up began."""
    peak_memory_reserved_bytes: int
    """Highest bytes that the caching allocator held; equal to allocated where there is no such allocator (CPU)."""
    peak_device_used_bytes: int
    """Bytes of the device in use, all processes and the driver's context included; equal to allocated on CPU."""
    device_memory_bytes: int
    """Total bytes of the device, or the enforced limit on CPU."""
    allocator_retries: int
    """Times the allocator had to flush its cache and try again."""
    phase_seconds: dict[str, float]
    """Wall seconds of `start`, `build`, `warmup` and `measure`."""
    environment: dict[str, str]
    """Versions and device name, see `autotune.trial.environment`."""
    long_run: LongRun | None = None
    """None in a screening run."""
    micro_step_tokens: tuple[int, ...] = ()
    """Tokens of each of `micro_step_seconds` that the rank trained on, padding left out; empty: as many as the workload
    says."""
    update_step_tokens: tuple[int, ...] = ()
    """The same of each of `update_step_seconds`."""
    stopped_early: bool = False
    """Whether the ranks agreed that the config is too slow, and left the remaining micro-steps out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """What one rank reported, or its parent saw, when it failed."""

    rank: int | None
    kind: FailureKind
    phase: Phase
    message: str
    requested_bytes: int | None = None
    """The allocation that was refused, when memory ran out and the library said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A trial that ran. Times are of the slowest rank, memory of the fullest."""

    step_time_seconds: float
    """One optimizer step at the workload's global batch."""
    tokens_per_second_per_gpu: float
    model_flops_utilization: float | None
    """0..1 of the device's dense peak at the config's precision; None where no peak is known (CPU)."""
    peak_memory_allocated_bytes: int
    peak_memory_reserved_bytes: int
    peak_device_used_bytes: int
    device_memory_bytes: int
    allocator_retries: int
    phase_seconds: dict[str, float]
    ranks: tuple[RankMeasurement, ...]
    elapsed_seconds: float = 0.0
    """Wall seconds from the reservation of the GPUs to their release."""
    log_path: str | None = None

    @property
    def confirms(self) -> bool:
        """Whether whole optimizer steps were timed, as a confirmation does."""
        return any(rank.long_run is not None for rank in self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `outcome_from_dict` reads it back."""
        return {"outcome": "measurement", **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A trial that did not run to its end."""

    kind: FailureKind
    phase: Phase
    message: str
    """One or a few lines: the error of the first rank that failed."""
    rank: int | None = None
    """The first rank that failed; None when it was not a rank."""
    requested_bytes: int | None = None
    most_tokens_per_second_per_gpu: float | None = None
    """Of a trial that was stopped early: it would not have been faster than this."""
    peak_device_used_bytes: int | None = None
    """Of a trial that was stopped early: its peak, as `Measurement` has it; None where it may not have been reached."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    elapsed_seconds: float = 0.0
    log_path: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `outcome_from_dict` reads it back."""
        return {"outcome": "failure", **dataclasses.asdict(self), "kind": self.kind.value, "phase": self.phase.value}


Outcome = Measurement | Failure


def outcome_from_dict(fields: dict[str, Any]) -> Outcome:
    """The inverse of `to_dict` of both kinds."""
    fields = dict(fields)
    if fields.pop("outcome") == "failure":
        return Failure(**{**fields, "kind": FailureKind(fields["kind"]), "phase": Phase(fields["phase"])})
    ranks = tuple(
        RankMeasurement(
            **{
                **rank,
                "micro_step_seconds": tuple(rank["micro_step_seconds"]),
                "update_step_seconds": tuple(rank["update_step_seconds"]),
                "losses": tuple(rank["losses"]),
                "micro_step_tokens": tuple(rank.get("micro_step_tokens", ())),
                "update_step_tokens": tuple(rank.get("update_step_tokens", ())),
                "long_run": None if rank.get("long_run") is None else _long_run(rank["long_run"]),
            }
        )
        for rank in fields.pop("ranks")
    )
    return Measurement(**fields, ranks=ranks)


def _long_run(fields: dict[str, Any]) -> LongRun:
    gpu = fields["gpu"]
    lists = {name: tuple(fields.get(name, ())) for name in ("step_seconds", "allocated_bytes", "step_tokens")}
    health = None if gpu is None else GpuHealth(**{**gpu, "throttle_reasons": tuple(gpu["throttle_reasons"])})
    return LongRun(**{**fields, **lists, "gpu": health})
