"""A rank's process before any heavy library: where it sits, whom it dies with, how it reports."""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from autotune.spec.outcome import Phase
from autotune.spec.request import TrialRequest
from autotune.trial.leftovers import GANG_VARIABLE, mapped_shared_memory

STACKS_SIGNAL = signal.SIGUSR1
"""Makes a rank write its Python stack to its log, even while it waits inside a collective."""

CHECKPOINT = "checkpoint"
"""Folder beside a rank's log in which it saves a checkpoint, to be deleted."""

SCRIPT_VARIABLE = "AUTOTUNE_SCRIPT"
"""Names, to the processes of a user's script, the folder in which each meets its rank."""

_PR_SET_PDEATHSIG = 1
_CUDA_ERROR_NOT_INITIALIZED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a rank sits in its gang."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_address: str
    master_port: int
    gpu_ids: tuple[str, ...]
    """The GPUs of the whole gang on this node; the local rank picks one. Empty: what the process sees already."""
    log_path: str
    started: float
    """`time.monotonic()` when the gang was started, which processes of one machine share."""
    gang: str = ""
    """Names the gang among all on this machine, see `autotune.trial.leftovers`."""
    scratch: str = ""
    """Folder of the gang's ranks on this node, removed at its end; only where a user's script runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A rank's sign of life, sent whenever it enters a phase."""

    phase: Phase
    phase_seconds: dict[str, float]
    """Wall seconds of `start`, `build`, `warmup` and `measure`, the last of them so far."""


class Reporter:
    """Keeps a rank's phase and clock, and tells the parent of every change."""

    def __init__(self, send: Callable[[Progress], None], started: float) -> None:
        self.phase = Phase.START
        self._send = send
        self._stage = "start"
        self._stage_started = started
        self._finished: dict[str, float] = {}

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Wall seconds of each stage, the running one so far."""
        return {**self._finished, self._stage: time.monotonic() - self._stage_started}

    def enter_stage(self, stage: str, phase: Phase) -> None:
        """The running stage is over and `stage` begins, with `phase`."""
        self._finished = self.phase_seconds
        self._stage, self._stage_started = stage, time.monotonic()
        self.enter_phase(phase)

    def relay(self, progress: Progress) -> None:
        """What another process says of its progress on this rank's behalf; the clock is that process's."""
        self.phase = progress.phase
        self._send(progress)

    def enter_phase(self, phase: Phase) -> None:
        """Still in the stage, the rank enters `phase`."""
        self.phase = phase
        self._send(Progress(phase=phase, phase_seconds=self.phase_seconds))


def main(channel: Connection, seat: Seat, request: TrialRequest, engine: str, environment: dict[str, str]) -> None:
    """Run one rank and send its `RankMeasurement` or `RankFailure`. Never returns.

    Args:
        channel: to the parent.
        seat: where this rank sits.
        request: the trial.
        engine: `module:function` that builds the engine.
        environment: variables of the trial, for a process that no fork server has given them.
    """
    die_with_the_pool()
    began = time.time()
    reporter = Reporter(channel.send, seat.started)
    reporter.enter_phase(Phase.START)
    try:
        _write_to(seat.log_path)
        faulthandler.enable()
        faulthandler.register(STACKS_SIGNAL)
        os.environ.update(environment | _seat_environment(seat, request))
        from autotune.trial.worker import leave_group, run_rank

        channel.send(run_rank(seat, request, engine, reporter))
        leave_group()
        _unlink_shared_memory(began)
    except BaseException as error:
        with contextlib.suppress(Exception):  # a full disk must not keep the verdict back
            traceback.print_exc()
            _unlink_shared_memory(began)
        from autotune.trial.failure import classify

        channel.send(classify(error, rank=seat.rank, phase=reporter.phase, device=request.device))
        _exit(1)
    _exit(0)


def probe(channel: Connection) -> None:
    """What a child of the fork server finds: sends an empty text if all is well, else what is wrong. Never returns."""
    die_with_the_pool()
    channel.send(_what_is_wrong())
    _exit(0)


def script_socket(folder: str, local_rank: int) -> str:
    """Where the process of a user's script meets the rank that it works for."""
    return str(Path(folder) / f"rank{local_rank}")


def die_with_the_pool() -> None:
    """Lead a process group of its own, and take it along when the parents die, whatever kills them."""
    os.setpgid(0, 0)
    # The direct parent: the fork server, or the pool's thread with `spawn`.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The pool. Its children hold the pipe that keeps the fork server alive, so that alone would not end when it dies.
    pool = multiprocessing.parent_process()
    if pool is not None:
        threading.Thread(target=_outlive_nobody, args=(pool,), name="pool-watch", daemon=True).start()


def _outlive_nobody(pool: multiprocessing.process.BaseProcess) -> None:
    pool.join()
    os.killpg(0, signal.SIGKILL)


def _unlink_shared_memory(since: float) -> None:
    with contextlib.suppress(OSError):
        for segment in mapped_shared_memory(os.getpid(), since):
            segment.unlink(missing_ok=True)


def _write_to(log_path: str) -> None:
    path = Path(log_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a killed rank flushes nothing


def _seat_environment(seat: Seat, request: TrialRequest) -> dict[str, str]:
    """What torchrun sets, and the GPUs."""
    variables = {
        "RANK": str(seat.rank),
        "LOCAL_RANK": str(seat.local_rank),
        "WORLD_SIZE": str(seat.world_size),
        "LOCAL_WORLD_SIZE": str(seat.local_world_size),
        "MASTER_ADDR": seat.master_address,
        "MASTER_PORT": str(seat.master_port),
        GANG_VARIABLE: seat.gang,
    }
    if seat.master_address == "127.0.0.1":
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host name resolves to
    if request.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif seat.gpu_ids:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(seat.gpu_ids)
    return variables


def _what_is_wrong() -> str:
    if "autotune.trial.preload" not in sys.modules:
        try:  # The fork server swallows an ImportError; here it is seen.
            import autotune.trial.preload  # noqa: F401
        except Exception as error:
            return f"the preload failed: {type(error).__name__}: {error}"
        return "the fork server has not imported autotune.trial.preload"
    import torch

    cuda: Any = torch.cuda  # partly without annotations
    if cuda.is_initialized() or cuda._is_in_bad_fork():
        return "the preload has initialised CUDA"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""  # no driver, no CUDA
    # A library may use the driver behind PyTorch's back. Then the driver refuses a forked process.
    if driver.cuInit(0) == _CUDA_ERROR_NOT_INITIALIZED:
        return "the preload has initialised the CUDA driver"
    return ""


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)  # no finalizers: they may wait for ranks that are gone
