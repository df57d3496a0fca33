"""`NodePool`: one per node; keeps a warm fork server and runs gangs of ranks, each in fresh processes.

A process that ran out of memory is not reused: fragments, half-finished collectives and DeepSpeed's global state stay
in it. So each rank of each trial is a new process. What makes that cheap is multiprocessing's fork server, which has
the libraries imported (`autotune.trial.preload`) and forks ranks in milliseconds.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

from autotune.errors import UsageError
from autotune.spec.outcome import FailureKind, Phase, RankFailure
from autotune.spec.request import DeviceType, TrialRequest
from autotune.trial import child
from autotune.trial.build_cache import VARIABLE, open_build_cache
from autotune.trial.gang import PROCESS_LOCK, GangResult, Rank, end, result, wait_for, watch
from autotune.trial.leftovers import Owner, kill_strays
from autotune.trial.swap_folder import lend

__all__ = ["GangResult", "NodePool", "trial_environment"]

PRELOAD = "autotune.trial.preload"
ENGINE = "autotune.engines.engine:build_engine"
READY_SECONDS = 300.0
"""Importing the libraries takes seconds, from a cold network file system minutes."""
STRAYS_SECONDS = 10.0
"""How long to wait until killed processes that left their rank's process group are gone."""
PORTS = range(20000, 30000)
"""Below the range that kernels draw outgoing connections from, so that nobody takes a port between choice and use."""


@dataclass(frozen=True, slots=True)
class _Running:
    cancel: Connection
    """Where a word ends the gang."""
    gpu_ids: frozenset[str]


class NodePool:
    """Runs trials on one node. One pool a process: pools of one process would share their fork server.

    `run` may be called from several threads at a time.

    Args:
        device: the device type of every trial.
        log_dir: logs go to `log_dir/TRIAL_ID/rankN.log`.
        start_method: `forkserver`, or `spawn` where forking does not work: each rank then imports everything itself.
        engine: `module:function` that builds a rank's engine (`autotune.engines.engine.build_engine`).
    """

    def __init__(
        self, *, device: DeviceType, log_dir: str, start_method: str = "forkserver", engine: str = ENGINE
    ) -> None:
        if start_method not in ("forkserver", "spawn"):
            raise ValueError(f"found start_method {start_method!r}, but it is forkserver or spawn")
        self._device = device
        self._log_dir = Path(log_dir).absolute()
        self._engine = engine
        self._build_cache = open_build_cache()
        self._environment = trial_environment(device, str(self._build_cache.folder))
        self._lock = threading.Lock()
        self._gangs: dict[str, _Running] = {}  # by trial id
        self._idle = threading.Condition(self._lock)
        self._closed = False
        self._ready_lock = threading.Lock()
        self._ready: dict[str, str] | None = None
        self._start_method = start_method
        ports = list(PORTS)
        start = random.randrange(len(ports))
        self._ports = itertools.cycle(ports[start:] + ports[:start])
        if start_method == "forkserver":
            forkserver.set_forkserver_preload([PRELOAD])
            with self._children_start():
                forkserver.ensure_running()  # imports in the background

    def ready(self) -> dict[str, str]:
        """Wait until ranks can start, and check that forking works; else fall back to `spawn`.

        Returns:
            `start_method`, `forkserver` or `spawn`, and `reason`.
        """
        with self._ready_lock:
            if self._ready is None:
                reason = "asked for"
                if self._start_method == "forkserver":
                    wrong = self._probe()
                    reason = wrong or "a forked child found the libraries imported and CUDA untouched"
                    if wrong:
                        self._start_method = "spawn"
                self._ready = {"start_method": self._start_method, "reason": reason}
            return dict(self._ready)

    def run(
        self,
        request: TrialRequest,
        *,
        ranks: Sequence[int],
        world_size: int,
        master_address: str,
        master_port: int,
        gpu_ids: Sequence[str] = (),
        owner_pid: int | None = None,
    ) -> GangResult:
        """Run this node's ranks of a trial to their end; when it returns none of their processes is left.

        Args:
            request: the trial.
            ranks: global ranks that run on this node, in order of their local rank.
            world_size: ranks on all nodes.
            master_address: of the node of rank 0.
            master_port: a free port there (`free_port`).
            gpu_ids: GPUs of this node's ranks, as CUDA_VISIBLE_DEVICES takes them; empty: those that the pool sees.
                Each is lent to one trial at a time, so a gang that is found on them has lost its owner and is ended.
            owner_pid: the process on this node that holds the GPUs for the trial, which ends with it.

        Raises:
            ValueError: a trial of this id is running here, or the request is for another device.
        """
        if request.device != self._device:
            raise ValueError(f"trial {request.trial_id} is for {request.device}, but this pool is for {self._device}")
        self.ready()
        began = time.time()
        cancelled, cancel = multiprocessing.Pipe(duplex=False)
        with self._lock:
            if self._closed:
                cancelled.close()
                cancel.close()
                late = f"the pool was shut down before trial {request.trial_id} began"
                return _unstarted(FailureKind.INTERRUPTED, late)
            if request.trial_id in self._gangs:
                raise ValueError(f"trial {request.trial_id} is running here already")
            before = [trial_id for trial_id, gang in self._gangs.items() if gang.gpu_ids & set(gpu_ids)]
            self._gangs[request.trial_id] = _Running(cancel, frozenset(gpu_ids))
        outcome: GangResult | None = None
        try:
            self._evict(before)
            owner = None if owner_pid is None else Owner(owner_pid)
            outcome = self._run(request, ranks, world_size, master_address, master_port, gpu_ids, cancelled, owner)
            return outcome
        finally:
            with self._lock:
                del self._gangs[request.trial_id]
                cancelled.close()
                cancel.close()
                killed = outcome is None or outcome.failure is not None
                if killed and not self._gangs and not self._closed:
                    self._build_cache.sweep(since=began)
                self._idle.notify_all()

    def cancel(self, trial_id: str) -> bool:
        """End a trial, whose `run` then returns `interrupted`; whether it was running here."""
        with self._lock:
            gang = self._gangs.get(trial_id)
            if gang is not None:
                gang.cancel.send(None)
            return gang is not None

    def free_port(self) -> int:
        """A TCP port that nobody listens on. No two calls give the same one for a long while."""
        for _ in PORTS:
            with self._lock:
                port = next(self._ports)
            with contextlib.suppress(OSError), socket.socket() as candidate:
                candidate.bind(("", port))
                return port
        raise OSError(f"no TCP port of {PORTS.start}..{PORTS.stop - 1} is free")

    def shutdown(self) -> None:
        """End all trials and wait for them, then stop the fork server. Trials asked for later are `interrupted`."""
        with self._lock:
            self._closed = True
            for gang in self._gangs.values():
                gang.cancel.send(None)
            self._idle.wait_for(lambda: not self._gangs)
        self._build_cache.close()
        if self._start_method == "forkserver":
            forkserver._forkserver._stop()  # type: ignore[attr-defined] # it would live as long as this process

    def _run(
        self,
        request: TrialRequest,
        ranks: Sequence[int],
        world_size: int,
        master_address: str,
        master_port: int,
        gpu_ids: Sequence[str],
        cancelled: Connection,
        owner: Owner | None,
    ) -> GangResult:
        started = time.monotonic()
        began = time.time()
        name = f"{os.getpid()}-{started}"
        gang: list[Rank] = []
        failure: RankFailure | None = None
        finished = False
        try:
            request, swap = lend(request, name, len(ranks))
        except UsageError as error:
            return _unstarted(FailureKind.INVALID_CONFIG, str(error))
        scratch = "" if request.script is None else tempfile.mkdtemp(prefix="autotune-trial-")
        try:
            for local_rank, rank in enumerate(ranks):
                seat = child.Seat(
                    rank=rank,
                    local_rank=local_rank,
                    world_size=world_size,
                    local_world_size=len(ranks),
                    master_address=master_address,
                    master_port=master_port,
                    gpu_ids=tuple(gpu_ids),
                    log_path=str(self._log_dir / request.trial_id / f"rank{rank}.log"),
                    started=started,
                    gang=name,
                    scratch=scratch,
                )
                gang.append(self._start(seat, request))
            failure = watch(gang, request, cancelled=cancelled, started=started, owner=owner)
            finished = failure is None
        except (OSError, EOFError) as error:  # the fork server died, or the node is out of processes or files
            failure = RankFailure(
                rank=None,
                kind=FailureKind.WORKER_LOST,
                phase=Phase.START,
                message=f"a rank could not be started: {type(error).__name__}: {error}",
            )
        finally:
            stuck = end(gang, delivered=finished, began=began)
            wait_for(lambda: not kill_strays(name), STRAYS_SECONDS)
            if request.long_run is not None:  # ranks remove it themselves, unless they were killed
                shutil.rmtree(self._log_dir / request.trial_id / child.CHECKPOINT, ignore_errors=True)
            if swap is not None:
                swap.close()
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
        return result(gang, stuck or failure)

    def _evict(self, trial_ids: Sequence[str]) -> None:
        for trial_id in trial_ids:
            self.cancel(trial_id)
        with self._lock:
            self._idle.wait_for(lambda: not any(trial_id in self._gangs for trial_id in trial_ids))

    def _start(self, seat: child.Seat, request: TrialRequest) -> Rank:
        context = self._context()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(  # type: ignore[attr-defined]
            target=child.main,
            args=(sender, seat, request, self._engine, self._environment),
            name=f"{request.trial_id} rank {seat.rank}",
            daemon=True,
        )
        try:
            with self._children_start():
                process.start()
        except BaseException:
            receiver.close()
            raise
        finally:
            sender.close()
        return Rank(seat.rank, process, receiver, seat.log_path)

    def _probe(self) -> str:
        """What is wrong with forked children; empty if nothing."""
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=child.probe, args=(sender,), daemon=True)
        try:
            with self._children_start():
                process.start()
            sender.close()
            if not receiver.poll(READY_SECONDS):
                return f"the fork server did not answer within {READY_SECONDS:.0f} s"
            wrong: str = receiver.recv()
            return wrong
        except (OSError, EOFError) as error:
            return f"the fork server does not work: {type(error).__name__}: {error}"
        finally:
            sender.close()
            receiver.close()
            if process.pid is not None:
                with PROCESS_LOCK:
                    process.kill()
                    process.join()

    def _context(self) -> BaseContext:
        return multiprocessing.get_context(self._start_method)

    @contextlib.contextmanager
    def _children_start(self) -> Iterator[None]:
        """Start children with the trial's environment and without our `__main__`.

        multiprocessing has every child run the parent's main module again: Ray's worker, pytest, or the user's script.
        Ours need nothing of it.
        """
        with PROCESS_LOCK, _environment(self._environment):
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                yield
            finally:
                sys.modules["__main__"] = main


def trial_environment(device: DeviceType, build_folder: str) -> dict[str, str]:
    """Variables of the fork server and its ranks. They must be there before the libraries are imported."""
    variables = {
        VARIABLE: build_folder,
        # Otherwise DeepSpeed looks for an accelerator when it is imported, which would initialise CUDA in the server.
        "DS_ACCELERATOR": device,
        # Otherwise torch.cuda.is_available() initialises CUDA.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Otherwise importing numpy starts a thread pool, which must not be in a process that forks.
        "OPENBLAS_NUM_THREADS": "1",
        # Models are built from their configs. Many ranks asking a hub at once is slow, and fails where there is none.
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # The fork server does not get our sys.path from multiprocessing, though ranks do.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if device == "cpu":
        # Ranks share the cores. With CUDA the ranks of offloading trials need them; there each sets its share later.
        variables["OMP_NUM_THREADS"] = "1"
    return variables


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _unstarted(kind: FailureKind, message: str) -> GangResult:
    failure = RankFailure(rank=None, kind=kind, phase=Phase.START, message=message)
    return GangResult(ranks=(), failure=failure, phase_seconds={}, log_path=None)
