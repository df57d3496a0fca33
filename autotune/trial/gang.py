"""One trial on one node as its parent sees it: watch the ranks, decide on the first failure, kill all, reap all."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from autotune.spec.outcome import FailureKind, Phase, RankFailure, RankMeasurement
from autotune.spec.request import TrialRequest
from autotune.trial.child import STACKS_SIGNAL, Progress
from autotune.trial.compose import slowest
from autotune.trial.failure import is_collateral, is_collective_timeout
from autotune.trial.host_memory import oom_kills
from autotune.trial.leftovers import Owner, mapped_shared_memory

GRACE_SECONDS = 0.3
"""How long the failure of a survivor waits for the verdict of the rank that it survived."""
EXIT_SECONDS = 5.0
"""How long ranks that have delivered may take to leave."""
STACKS_SECONDS = 0.3
"""How long hanging ranks get to write their stacks."""
UNKILLABLE_SECONDS = 60.0
"""After this long a killed process is stuck in the kernel, and so is the node's device."""
OWNER_POLL_SECONDS = 0.5
"""How often to look whether the process that the trial is run for still lives."""
QUIET = frozenset({Phase.BUILD, Phase.SAVE})
"""Phases in which silence is no hang: weights are read, extensions compiled, checkpoints written, for minutes."""
TAIL_LINES = 8
TAIL_BYTES = 16384
TAIL_LINE_CHARACTERS = 300

PROCESS_LOCK = threading.RLock()
"""Starting and reaping through multiprocessing is one thread at a time: each start polls every child, and two threads
that poll one child at the same moment take its exit code from each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GangResult:
    """What the ranks of one node found out."""

    ranks: tuple[RankMeasurement, ...]
    """All local ranks in order, or none if there is a failure."""
    failure: RankFailure | None
    phase_seconds: dict[str, float]
    """Wall seconds of `start`, `build`, `warmup` and `measure` of the slowest rank, as far as it came."""
    log_path: str | None
    """Log of the rank that failed, else of the first one."""


class Rank:
    """A rank's process and what it has said so far."""

    def __init__(self, rank: int, process: BaseProcess, channel: Connection, log_path: str) -> None:
        self.rank = rank
        self.process = process
        self.channel = channel
        self.log_path = log_path
        self.progress = Progress(phase=Phase.START, phase_seconds={})
        self.measurement: RankMeasurement | None = None
        self.failure: RankFailure | None = None
        self._heard_at = time.monotonic()
        self._silent = False

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Wall seconds of each stage, the one it is in so far."""
        stages = dict(self.progress.phase_seconds)
        for running in list(stages)[-1:]:
            stages[running] += time.monotonic() - self._heard_at
        return stages

    @property
    def has_verdict(self) -> bool:
        """It has delivered a result or failed."""
        return self.measurement is not None or self.failure is not None

    @property
    def events(self) -> list[Connection | int]:
        """What to wait for."""
        return [self.process.sentinel] if self._silent else [self.channel, self.process.sentinel]

    def listen(self) -> bool:
        """Read all that the rank has said; whether it said anything."""
        heard = False
        try:
            while not self._silent and self.channel.poll():
                message = self.channel.recv()
                heard = True
                if isinstance(message, Progress):
                    self.progress, self._heard_at = message, time.monotonic()
                elif isinstance(message, RankMeasurement):
                    self.measurement = message
                else:
                    self.failure = message
        except (EOFError, OSError):
            self._silent = True  # it is dead or about to be: its sentinel tells
        return heard

    def bury(self, oom_kills_before: int | None) -> None:
        """The process has ended without a verdict: find out why."""
        with PROCESS_LOCK:
            self.process.join()
            code = self.process.exitcode
        kind = FailureKind.CRASH
        log = log_end(self.log_path)
        tail = log_tail(log)
        if code == -signal.SIGKILL and _kernel_killed(oom_kills_before):
            kind = FailureKind.HOST_OUT_OF_MEMORY
            ending = "was killed by SIGKILL, sent by the kernel because the host's memory ran out"
        elif code is not None and code < 0:
            ending = f"was killed by {signal.Signals(-code).name}"
            late = [line for line in log if is_collective_timeout(line)]
            if code == -signal.SIGABRT and late:
                kind = FailureKind.HANG  # NCCL's watchdog says so and aborts the process; stacks follow its words
                tail = late[:1]
        elif code == 255:  # what multiprocessing says for children of a fork server that is gone
            kind = FailureKind.WORKER_LOST
            ending = "ended together with the fork server"
        else:
            ending = f"exited with code {code} and said nothing"
        message = "\n".join([f"rank {self.rank} {ending} in phase {self.progress.phase}", *tail])
        self.failure = RankFailure(rank=self.rank, kind=kind, phase=self.progress.phase, message=message)

    def signal_group(self, number: signal.Signals) -> None:
        """Signal the rank and what it started. The rank leads a process group as soon as it runs."""
        for send in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.process.pid or 0, number)


def watch(
    ranks: Sequence[Rank],
    request: TrialRequest,
    *,
    cancelled: Connection,
    started: float,
    owner: Owner | None = None,
) -> RankFailure | None:
    """Wait until every rank has delivered, or one failed, or time is up.

    The failure that counts is the first one, except that a rank's own verdict beats what its survivors say about it,
    which can be heard earlier.

    Silence is a hang, but not while the model is built or saved: there a rank reads weights, compiles or writes for
    minutes without a word, while its peers wait for it in a collective, and no rank leaves before all are done
    (`autotune.trial.worker`). What hangs there is caught by the process group's timeout or by the deadline.

    Args:
        ranks: the gang on this node.
        request: the trial.
        cancelled: readable when the trial shall end.
        started: `time.monotonic()` when the gang was started.
        owner: the process that the trial is run for; the gang ends with it.

    Returns:
        None if every rank has delivered.
    """
    oom_kills_before = oom_kills()
    deadline = started + request.timeout_seconds
    last_progress = time.monotonic()
    first_failure = float("inf")
    while True:
        failures = [rank.failure for rank in ranks if rank.failure is not None]
        pending = [rank for rank in ranks if not rank.has_verdict]
        quiet = any(rank.progress.phase in QUIET for rank in pending)
        silent_until = last_progress + request.stall_seconds
        patience = deadline if quiet else min(deadline, silent_until)
        now = time.monotonic()
        if failures:
            first_failure = min(first_failure, now)
            best = max(failures, key=_weight)
            if not pending or _weight(best) > 0 or now >= first_failure + GRACE_SECONDS:
                return _waited_in_vain(best, pending) if best.kind is FailureKind.HANG else best
        elif not pending:
            return None
        elif owner is not None and owner.is_gone():
            return RankFailure(
                rank=None,
                kind=FailureKind.WORKER_LOST,
                phase=pending[0].progress.phase,
                message="the process that the trial was run for has ended",
            )
        elif now >= patience and now >= silent_until:
            return _hang(pending, now - last_progress)
        elif now >= patience:
            return RankFailure(
                rank=None,
                kind=FailureKind.TIMEOUT,
                phase=pending[0].progress.phase,
                message=f"not finished after {request.timeout_seconds:.0f} s; {_where(pending)}",
            )
        until = first_failure + GRACE_SECONDS if failures else patience
        if owner is not None:
            until = min(until, now + OWNER_POLL_SECONDS)
        ready = wait([cancelled, *(event for rank in pending for event in rank.events)], max(0.0, until - now))
        if cancelled in ready:
            return RankFailure(
                rank=None,
                kind=FailureKind.INTERRUPTED,
                phase=pending[0].progress.phase,
                message="the trial was cancelled",
            )
        for rank in pending:
            ended = rank.process.sentinel in ready  # looked at first: what it has said is then all there
            if rank.listen():
                last_progress = time.monotonic()
            if ended and not rank.has_verdict:
                rank.bury(oom_kills_before)


def end(ranks: Sequence[Rank], *, delivered: bool, began: float | None = None) -> RankFailure | None:
    """Leave nothing behind: no process, no zombie, no pipe, no shared memory.

    Args:
        ranks: the gang.
        delivered: every rank has delivered and is leaving by itself, which closes communicators in good order.
        began: `time.time()` when the gang was started; None leaves shared memory alone.

    Returns:
        A failure of the node if a process cannot be killed; its pipes are then left open.
    """
    shared: set[Path] = set()
    if began is not None:
        shared = shared.union(*(mapped_shared_memory(rank.process.pid, began) for rank in ranks))
    if delivered:
        wait_for(lambda: not any(_is_alive(rank) for rank in ranks), EXIT_SECONDS)
    for rank in ranks:
        rank.signal_group(signal.SIGKILL)  # also when it has ended: what it started may be alive
    if not wait_for(lambda: not any(_is_alive(rank) for rank in ranks), UNKILLABLE_SECONDS):
        stuck = ", ".join(f"rank {rank.rank} (pid {rank.process.pid})" for rank in ranks if _is_alive(rank))
        return RankFailure(
            rank=None,
            kind=FailureKind.NODE_LOST,
            phase=ranks[0].progress.phase,
            message=f"{stuck} survived SIGKILL for {UNKILLABLE_SECONDS:.0f} s; the device needs a reset",
        )
    wait_for(lambda: not any(_group_exists(rank.process.pid) for rank in ranks), 1.0)
    with PROCESS_LOCK:
        for rank in ranks:
            rank.process.join()
            rank.process.close()
            rank.channel.close()
    for segment in shared:
        segment.unlink(missing_ok=True)
    return None


def result(ranks: Sequence[Rank], failure: RankFailure | None) -> GangResult:
    """What to report for the gang."""
    measurements = [rank.measurement for rank in ranks if rank.measurement is not None]
    blamed = [rank for rank in ranks if failure is not None and rank.rank == failure.rank]
    return GangResult(
        ranks=() if failure is not None else tuple(sorted(measurements, key=lambda measured: measured.rank)),
        failure=failure,
        phase_seconds=slowest([measured.phase_seconds for measured in measurements])
        if failure is None
        else slowest([rank.phase_seconds for rank in ranks]),
        log_path=(blamed or list(ranks))[0].log_path,
    )


def log_end(path: str) -> list[str]:
    """The last lines of a log, as many as a crash with the stacks of all its threads may take."""
    try:
        with Path(path).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip()[:TAIL_LINE_CHARACTERS] for line in text.splitlines() if line.strip()]


def log_tail(lines: Sequence[str]) -> list[str]:
    """The last few of these lines of a log, or the innermost frames of the thread in which Python crashed."""
    crashes = [i for i, line in enumerate(lines) if line.startswith("Current thread")]  # faulthandler's words
    return list(lines[crashes[-1] :][:TAIL_LINES] if crashes else lines[-TAIL_LINES:])


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition holds within the time."""
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(0.05, 2 * pause)
    return True


def _weight(failure: RankFailure) -> int:
    """How sure it is that a failure is the cause and no consequence."""
    if failure.kind.is_memory:
        return 2
    return 0 if is_collateral(failure.message) else 1


def _hang(ranks: Sequence[Rank], silent_seconds: float) -> RankFailure:
    _write_stacks(ranks)
    return RankFailure(
        rank=None,
        kind=FailureKind.HANG,
        phase=ranks[0].progress.phase,
        message=f"no rank made progress for {silent_seconds:.0f} s; {_where(ranks)}; stacks are in the logs",
    )


def _waited_in_vain(failure: RankFailure, pending: Sequence[Rank]) -> RankFailure:
    """A rank's process group gave up waiting. The rank is not to blame, but those that it waited for."""
    where = ""
    if pending:
        _write_stacks(pending)
        where = f"; {_where(pending)}; stacks are in the logs"
    return dataclasses.replace(failure, rank=None, message=f"rank {failure.rank} waited: {failure.message}{where}")


def _write_stacks(ranks: Sequence[Rank]) -> None:
    """Have the ranks write down where they stand, which is what one wants to know of a hang."""
    for rank in ranks:
        rank.signal_group(STACKS_SIGNAL)
    time.sleep(STACKS_SECONDS)


def _kernel_killed(oom_kills_before: int | None) -> bool:
    now = oom_kills()
    return oom_kills_before is not None and now is not None and now > oom_kills_before


def _where(ranks: Sequence[Rank]) -> str:
    return ", ".join(f"rank {rank.rank} is in {rank.progress.phase}" for rank in ranks)


def _is_alive(rank: Rank) -> bool:
    with PROCESS_LOCK:
        return rank.process.is_alive()


def _group_exists(leader: int | None) -> bool:
    try:
        os.killpg(leader or 0, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
