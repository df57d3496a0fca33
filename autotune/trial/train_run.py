"""One trial under Ray Train as its driver sees it: start `fit`, watch, say what came of it, leave nothing behind."""

import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autotune.spec.cluster import ClusterSpec
from autotune.spec.outcome import Failure, FailureKind, Outcome, RankFailure
from autotune.spec.request import DeviceType, TrialRequest
from autotune.trial.build_cache import VARIABLE
from autotune.trial.compose import conclude, slowest
from autotune.trial.failure import describe, is_collective_timeout
from autotune.trial.gang import log_end, log_tail, wait_for
from autotune.trial.host_memory import oom_kills
from autotune.trial.leftovers import GANG_VARIABLE, kill_strays
from autotune.trial.pool import ENGINE, trial_environment
from autotune.trial.swap_folder import sweep
from autotune.trial.train_watch import Ended, Rank, phase_of, watch
from autotune.trial.train_worker import MeetingPoint, WorkerTask, log_path, run_worker

FIT_SECONDS = 15.0
"""How long `fit` may take to return once every rank has delivered or was killed."""
GONE_SECONDS = 60.0
"""How long killed processes may take to end. After that one is stuck in the kernel."""

_SETTINGS = {
    # By default 2: `fit` would return up to 4 s late.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # One more actor a trial, whose warning nobody would use: a trial that loses its node is run again.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Output belongs in the ranks' logs, and working directories need not be made.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Read by `fit` and handed on to Ray Train's controller and workers."""


def run_trial(
    request: TrialRequest,
    cluster: ClusterSpec,
    *,
    study: str,
    log_dir: str,
    engine: str = ENGINE,
    scratch: str | None = None,
) -> Outcome:
    """Run one trial to its end; when it returns none of its ranks is left.

    As under the pool the time limit does not count the import of the libraries, and silence is no hang while a rank
    builds its model.

    Args:
        request: the trial.
        cluster: where it runs; Ray is connected.
        study: names the Ray Train run, together with the trial.
        log_dir: logs go to `log_dir/TRIAL_ID/rankN.log`, on the node of the rank.
        engine: `module:function` that builds a rank's engine (`autotune.engines.engine.build_engine`).
        scratch: where Ray Train's own files go and are removed; None: where temporary files go.
    """
    os.environ.update(_SETTINGS)
    here = ray.get_runtime_context().get_node_id()
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": _on(here)})
    # Nothing is saved, but Ray Train writes a marker file.
    with tempfile.TemporaryDirectory(prefix="autotune-train-", dir=scratch, ignore_cleanup_errors=True) as storage:
        gang = _Gang(request, cluster, events, study=study, log_dir=log_dir, engine=engine, storage=storage)
        try:
            outcome = gang.outcome(gang.watch())
        finally:
            stuck = gang.end()
            events.shutdown(force=True)
    return outcome if stuck is None else gang.outcome(stuck)


class _Gang:
    """The ranks of one trial on all nodes, and the `fit` that holds them."""

    def __init__(
        self,
        request: TrialRequest,
        cluster: ClusterSpec,
        events: Queue,
        *,
        study: str,
        log_dir: str,
        engine: str,
        storage: str,
    ) -> None:
        self.ranks = [Rank() for _ in range(request.config.ranks)]
        self._request, self._gpu, self._events, self._log_dir = request, cluster.gpu, events, log_dir
        self._name = f"{request.trial_id}-{uuid.uuid4().hex}"
        self._started = time.monotonic()
        self._error: Exception | None = None  # of `fit`
        task = WorkerTask(request=request, engine=engine, log_dir=log_dir, events=events, started_at=time.time())
        on_cpu = request.device == "cpu"
        trainer = TorchTrainer(
            run_worker,
            train_loop_config={"task": task},
            torch_config=MeetingPoint(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=request.config.ranks,
                use_gpu=not on_cpu,
                resources_per_worker={"CPU" if on_cpu else "GPU": request.config.gpus_per_rank},
                placement_strategy="STRICT_PACK" if request.config.gpus <= cluster.gpus_per_node else "PACK",
            ),
            run_config=ray.train.RunConfig(
                name=f"{study}/{request.trial_id}",
                storage_path=storage,
                worker_runtime_env={"env_vars": _worker_environment(request.device) | {GANG_VARIABLE: self._name}},
                # A negative limit, the default of two of them, tries again for ever.
                failure_config=ray.train.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )
        self._fit = threading.Thread(target=self._run, args=(trainer,), name="fit", daemon=True)
        self._fit.start()

    def watch(self) -> RankFailure | None:
        """See `autotune.trial.train_watch.watch`."""
        return watch(self.ranks, self._events, self._request, started=self._started, explain=self._explain)

    def outcome(self, failure: RankFailure | None) -> Outcome:
        """What the trial found out: this failure, or what the ranks measured."""
        path = log_path(self._log_dir, self._request.trial_id, failure.rank or 0 if failure else 0)
        if failure is None:
            measured = conclude([rank.measurement for rank in self.ranks if rank.measurement], self._request, self._gpu)
            return replace(measured, log_path=path)
        seconds = slowest([rank.phase_seconds for rank in self.ranks])
        return Failure(
            kind=failure.kind,
            phase=failure.phase,
            message=failure.message,
            rank=failure.rank,
            requested_bytes=failure.requested_bytes,
            phase_seconds=seconds or {"start": time.monotonic() - self._started},
            log_path=path,
        )

    def end(self) -> RankFailure | None:
        """Leave nothing behind: no rank, and nothing that a rank has started.

        Returns:
            A failure of the node if a process cannot be killed.
        """
        if all(rank.measurement for rank in self.ranks):
            self._fit.join(FIT_SECONDS)  # they leave by themselves, which closes communicators in good order
        joined = [rank.joined for rank in self.ranks if rank.joined]
        for rank in joined:
            ray.kill(rank.actor)
        self._fit.join(FIT_SECONDS)
        nodes = {rank.node_id for rank in joined}
        if wait_for(lambda: not any(_on_node(node, kill_strays, self._name) for node in nodes), GONE_SECONDS):
            if self._request.config.swaps and self._request.nvme_path is not None:
                for node in nodes:
                    _on_node(node, sweep, Path(self._request.nvme_path))
            return None
        message = f"a rank survived SIGKILL for {GONE_SECONDS:.0f} s; the device needs a reset"
        return RankFailure(rank=None, kind=FailureKind.NODE_LOST, phase=phase_of(self.ranks), message=message)

    def _run(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except Exception as error:
            self._error = error
        with contextlib.suppress(RayError):  # it ended so late that nobody listens
            self._events.put((0, Ended()))

    def _explain(self) -> RankFailure | None:
        """What the error of `fit` says: a rank whose process died, else what kept Ray Train from going on."""
        error = self._error
        if isinstance(error, ray.train.WorkerGroupError):
            found = {rank: getattr(e, "health_check_failure", e) for rank, e in sorted(error.worker_failures.items())}
        else:  # a rank that dies while Ray Train is still busy with starting the group is an error of the controller
            error = getattr(error, "controller_failure", error)
            actor = getattr(error, "actor_id", None)
            found = {n: error for n, rank in enumerate(self.ranks) if rank.joined and rank.joined.actor_id == actor}
        for rank, death in found.items():
            if isinstance(death, (RayActorError, OutOfMemoryError)):
                return self._obituary(rank, death)
        if error is None:
            return None
        kind, message = _lost(error)
        return RankFailure(rank=None, kind=kind, phase=phase_of(self.ranks), message=message)

    def _obituary(self, number: int, death: Exception) -> RankFailure:
        rank = self.ranks[number]
        kind, message = _lost(death)
        if kind is FailureKind.WORKER_LOST and rank.joined and rank.progress:  # Ray only saw a connection close
            kind, why = FailureKind.CRASH, "it was killed, or it exited"
            log = log_end(log_path(self._log_dir, self._request.trial_id, number))
            tail = log_tail(log)
            fatal = [line for line in log if line.startswith("Fatal Python error")]  # faulthandler's words
            late = [line for line in log if is_collective_timeout(line)]
            if fatal and "Aborted" in fatal[-1] and late:
                kind, why, tail = FailureKind.HANG, fatal[-1], late[:1]  # NCCL's watchdog says so and aborts
            elif fatal:
                why = fatal[-1]
            elif (_on_node(rank.joined.node_id, oom_kills) or 0) > (rank.joined.oom_kills or 0):
                kind, why = FailureKind.HOST_OUT_OF_MEMORY, "the kernel killed it because the host's memory ran out"
            message = "\n".join([f"rank {number} died, last heard of in phase {rank.phase}: {why}", *tail])
        return RankFailure(rank=number, kind=kind, phase=rank.phase, message=message)


def _lost(error: Exception) -> tuple[FailureKind, str]:
    """What an error of Ray or of Ray Train's controller is, as far as it says."""
    message = " ".join(describe(error).split())[:500]
    if isinstance(error, OutOfMemoryError):
        return FailureKind.HOST_OUT_OF_MEMORY, message  # Ray's memory monitor killed the rank
    node = isinstance(error, NodeDiedError) or "node has died" in message
    return FailureKind.NODE_LOST if node else FailureKind.WORKER_LOST, message


def _worker_environment(device: DeviceType) -> dict[str, str]:
    """As the pool's, less what each node has to find out for itself."""
    variables = trial_environment(device, "")
    return {name: value for name, value in variables.items() if name not in (VARIABLE, "PYTHONPATH")}


def _on(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _on_node(node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on a node, which need not have anything free; None if it does not answer."""
    if node_id == ray.get_runtime_context().get_node_id():
        return function(*arguments)  # a task takes seconds where no idle process waits for one
    task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node_id))
    try:
        return ray.get(task.remote(*arguments), timeout=GONE_SECONDS)
    except RayError:
        return None
