"""Watching the ranks of a trial under Ray Train: what they say, and what their silence means.

Ray Train knows which workers died and ends the group on any failure. It does not know hangs, deadlines, or which of
several failures was the first; so the ranks tell the driver themselves, through one queue, and the end of `fit` is one
more message in it. The rules are those of `autotune.trial.gang.watch`.
"""

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from autotune.spec.outcome import FailureKind, Phase, RankFailure, RankMeasurement
from autotune.spec.request import TrialRequest
from autotune.trial.child import Progress
from autotune.trial.failure import is_collateral, is_collective_timeout
from autotune.trial.gang import QUIET, STACKS_SECONDS
from autotune.trial.pool import READY_SECONDS

SURVIVOR_SECONDS = 10.0
"""How long after the failure of a survivor the rank that it survived, or Ray Train for it, may need to say why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A rank's first words: who it is for Ray, and where."""

    actor: Any
    """The handle that ends it."""
    actor_id: str
    node_id: str
    oom_kills: int | None
    """By the kernel on that node so far."""


@dataclass(frozen=True, slots=True)
class Ended:
    """`fit` has returned or raised; what the ranks had to say has been said."""


Event = tuple[int, Joined | Progress | RankMeasurement | RankFailure | Ended]
"""(rank, what it says); for `Ended` any rank."""


class Events(Protocol):
    """A `queue.Queue`, or Ray's."""

    def get(self, *, timeout: float) -> Event:
        """The next one, or `queue.Empty` raised after so many seconds."""
        ...


@dataclass(slots=True)
class Rank:
    """What a rank has said so far."""

    joined: Joined | None = None
    progress: Progress | None = None
    heard_at: float = 0.0
    measurement: RankMeasurement | None = None

    @property
    def phase(self) -> Phase:
        """The latest that it has entered."""
        return self.progress.phase if self.progress else Phase.START

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Wall seconds of each stage, the one it is in so far."""
        stages = dict(self.progress.phase_seconds) if self.progress else {}
        for running in list(stages)[-1:]:
            stages[running] += time.monotonic() - self.heard_at
        return stages


def watch(
    ranks: Sequence[Rank],
    events: Events,
    request: TrialRequest,
    *,
    started: float,
    explain: Callable[[], RankFailure | None],
) -> RankFailure | None:
    """Wait until every rank has delivered, or one failed, or time is up.

    The failure that counts is the first one, except that survivors of another rank's failure wait for its verdict. The
    clock of the trial starts when the last rank has its libraries, and silence is no hang while a rank builds or
    saves its model.

    Args:
        ranks: in order; what they say is noted in them.
        events: what the ranks and `fit` say.
        request: the trial.
        started: `time.monotonic()` when the trial began.
        explain: the failure of a rank whose process died, or of Ray Train; None if it knows of none. Asked when `fit`
            has ended early.

    Returns:
        None if every rank has delivered.
    """
    collateral: RankFailure | None = None
    collateral_at = ready_at = 0.0
    while True:
        pending = [rank for rank in ranks if rank.measurement is None]
        if not pending:
            return None
        ready = all(rank.progress for rank in ranks)
        if ready and not ready_at:
            ready_at = time.monotonic()
        silent_until = max(rank.heard_at for rank in ranks) + request.stall_seconds
        if collateral is not None:
            until = collateral_at + SURVIVOR_SECONDS
        elif not ready:
            until = started + READY_SECONDS
        elif any(rank.phase in QUIET for rank in pending):
            until = ready_at + request.timeout_seconds
        else:
            until = min(ready_at + request.timeout_seconds, silent_until)
        try:
            number, message = events.get(timeout=max(0.01, until - time.monotonic()))
        except queue.Empty:
            if collateral is not None:
                return _waited_in_vain(collateral)
            return _out_of_time(ranks, request, ready=ready, silent_until=silent_until)
        rank = ranks[number]
        match message:
            case Joined():
                rank.joined = message
            case Progress():
                rank.progress, rank.heard_at = message, time.monotonic()
            case RankMeasurement():
                rank.measurement = message
            case RankFailure() if not is_collateral(message.message):
                return message
            case RankFailure() if collateral is None:
                collateral, collateral_at = message, time.monotonic()
            case Ended():
                reason = explain()
                if collateral is not None and (reason is None or reason.rank is None):
                    return _waited_in_vain(collateral)
                return reason or _lost(ranks)


def phase_of(ranks: Sequence[Rank]) -> Phase:
    """Where the trial is: the phase of the first rank that has not delivered."""
    return next((rank.phase for rank in ranks if rank.measurement is None), ranks[0].phase)


def _out_of_time(ranks: Sequence[Rank], request: TrialRequest, *, ready: bool, silent_until: float) -> RankFailure:
    where = ", ".join(f"rank {n} is in {rank.phase}" for n, rank in enumerate(ranks) if rank.measurement is None)
    silent = time.monotonic() - silent_until
    if not ready:
        kind = FailureKind.WORKER_LOST
        message = f"the ranks did not start within {READY_SECONDS:.0f} s"
    elif silent >= 0:
        time.sleep(STACKS_SECONDS)  # each rank writes them at about this moment
        kind = FailureKind.HANG
        message = f"no rank made progress for {silent + request.stall_seconds:.0f} s; {where}; stacks are in the logs"
    else:
        kind = FailureKind.TIMEOUT
        message = f"not finished after {request.timeout_seconds:.0f} s; {where}"
    return RankFailure(rank=None, kind=kind, phase=phase_of(ranks), message=message)


def _waited_in_vain(failure: RankFailure) -> RankFailure:
    """A rank that gave up waiting is not to blame, but those that it waited for."""
    if not is_collective_timeout(failure.message):
        return failure
    return replace(failure, rank=None, message=f"rank {failure.rank} waited: {failure.message}")


def _lost(ranks: Sequence[Rank]) -> RankFailure:
    message = "Ray Train ended without a word before every rank had delivered"
    return RankFailure(rank=None, kind=FailureKind.WORKER_LOST, phase=phase_of(ranks), message=message)
