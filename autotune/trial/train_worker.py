"""A rank as a worker of Ray Train: where it sits, how it reports, whom it leaves the process group to.

Ray Train starts the processes and says where they meet. What they then do is `run_rank`, as under the pool: it joins
the process group itself, with its own time limit and device.
"""

import contextlib
import faulthandler
import os
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import ray.train
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.util.queue import Queue

from autotune.spec.outcome import Phase, RankFailure, RankMeasurement
from autotune.spec.request import TrialRequest
from autotune.trial import child
from autotune.trial.build_cache import VARIABLE, BuildCache, open_build_cache
from autotune.trial.failure import classify, is_collateral
from autotune.trial.host_memory import oom_kills
from autotune.trial.leftovers import GANG_VARIABLE
from autotune.trial.pool import PORTS
from autotune.trial.swap_folder import lend
from autotune.trial.train_watch import SURVIVOR_SECONDS, Joined

BEAT_SECONDS = 0.2
"""How late the driver may hear of a rank's progress."""

_build_cache: BuildCache | None = None
"""Held until the process ends: a shared lock, see `autotune.trial.build_cache`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTask:
    """What every worker of a trial is given."""

    request: TrialRequest
    engine: str
    """`module:function` that builds the engine."""
    log_dir: str
    """Logs go to `log_dir/TRIAL_ID/rankN.log` on the worker's node."""
    events: Queue
    """Takes what `autotune.trial.train_watch` gets."""
    started_at: float
    """When the trial began, in seconds of `time.time`: other nodes have another monotonic clock."""


class MeetingPoint(TorchConfig):  # type: ignore[misc] # Ray ships no types
    """Tells the workers where to meet, and leaves the process group to them."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Called by Ray Train."""
        return _Rendezvous

    @property
    def train_func_context(self) -> type[contextlib.nullcontext[None]]:
        """Called by Ray Train, which would choose the device here."""
        return contextlib.nullcontext


class _Rendezvous(Backend):  # type: ignore[misc] # Ray ships no types
    share_cuda_visible_devices = True
    """Each worker sees the GPUs of all workers of its node, and its local rank picks one."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Called by Ray Train's controller when all workers are there."""
        address, port = worker_group.execute_single(0, _free_address)
        worker_group.execute(_meet_at, address, port)


def log_path(log_dir: str, trial_id: str, rank: int) -> str:
    """Where a rank's output goes."""
    return str(Path(log_dir) / trial_id / f"rank{rank}.log")


def run_worker(config: dict[str, WorkerTask]) -> None:
    """Run one rank, in the thread that Ray Train gives it, and send its measurement or failure to the driver.

    Raises:
        RuntimeError: the rank failed. The driver knows more by then; this tells Ray Train to end the others.
    """
    task = config["task"]
    seat = _seat(task)

    def send(message: Joined | child.Progress | RankMeasurement | RankFailure) -> None:
        task.events.put((seat.rank, message))

    send(_introduce())
    with _Pulse(send, task.request.stall_seconds) as pulse:
        reporter = child.Reporter(pulse.take, seat.started)
        try:
            _prepare(seat, task.request)
            import autotune.trial.preload  # noqa: F401 what the pool's ranks find imported is not the trial's time
            from autotune.trial.worker import leave_group, run_rank

            reporter.enter_phase(Phase.START)
            request, swap = lend(task.request, seat.gang, seat.local_world_size)
            measured = run_rank(seat, request, task.engine, reporter)
            pulse.stop()
            send(measured)
            leave_group()
            if swap is not None:  # else the driver removes it
                swap.close()
        except BaseException as error:
            with contextlib.suppress(Exception):  # a full disk must not keep the verdict back
                traceback.print_exc()
            failure = classify(error, rank=seat.rank, phase=reporter.phase, device=task.request.device)
            pulse.stop()
            send(failure)
            if is_collateral(failure.message):
                time.sleep(SURVIVOR_SECONDS)  # Ray Train would end the rank that knows more; the driver ends us earlier
            # Not the error itself: it may hold tensors, and need not be picklable.
            raise RuntimeError(failure.message) from None


class _Pulse:
    """Sends a rank's progress from a thread of its own, the latest only.

    A call to an actor takes about as long as a micro-step of a small model, and would be measured with it.
    """

    def __init__(self, send: Callable[[child.Progress], None], stall_seconds: float) -> None:
        self._send = send
        self._stall_seconds = stall_seconds
        self._latest: child.Progress | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def take(self, progress: child.Progress) -> None:
        """The rank has entered a phase."""
        self._latest = progress

    def stop(self) -> None:
        """Send what is left, so that nothing comes after the rank's verdict."""
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        sent = None
        over = False
        while not over:
            over = self._over.wait(BEAT_SECONDS)
            latest = self._latest
            if latest is not None and latest is not sent:
                # Stacks of a rank that stays silent for as long as a hang takes. No signal of the driver is needed for
                # it, nor the interpreter's lock.
                faulthandler.dump_traceback_later(self._stall_seconds, file=sys.stderr)
                self._send(latest)
                sent = latest


def _seat(task: WorkerTask) -> child.Seat:
    context = ray.train.get_context()
    on_one_node = context.get_local_world_size() == context.get_world_size()
    return child.Seat(
        rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        world_size=context.get_world_size(),
        local_world_size=context.get_local_world_size(),
        # Ranks of one node meet on loopback: it works whatever the host name resolves to.
        master_address="127.0.0.1" if on_one_node else os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
        gpu_ids=(),  # Ray Train has set what is visible
        log_path=log_path(task.log_dir, task.request.trial_id, context.get_world_rank()),
        started=time.monotonic() - max(0.0, time.time() - task.started_at),
        gang=os.environ[GANG_VARIABLE],
    )


def _introduce() -> Joined:
    context = ray.get_runtime_context()
    return Joined(
        actor=context.current_actor,
        actor_id=context.get_actor_id(),
        node_id=context.get_node_id(),
        oom_kills=oom_kills(),
    )


def _prepare(seat: child.Seat, request: TrialRequest) -> None:
    global _build_cache
    child._write_to(seat.log_path)
    faulthandler.enable()
    _build_cache = open_build_cache()
    os.environ.update(child._seat_environment(seat, request) | {VARIABLE: str(_build_cache.folder)})


def _free_address() -> tuple[str, int]:
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as candidate:
            candidate.bind(("", port))
            return ray.util.get_node_ip_address(), port
    raise OSError(f"no TCP port of {PORTS.start}..{PORTS.stop - 1} is free")


def _meet_at(address: str, port: int) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
