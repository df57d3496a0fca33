"""Every kind of failure on both real engines: whom it is put on, that it ends at once, and that nothing is left of it.

The fixture `faulty` takes the census, and each case is followed by a trial that runs.
"""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from autotune.spec.cluster import find_gpu
from autotune.spec.config import Engine, Offload
from autotune.spec.outcome import Failure, FailureKind, Phase, RankFailure
from autotune.spec.request import TrialRequest
from autotune.spec.workload import MeasureSettings, Workload
from autotune.trial.compose import conclude
from autotune.trial.failure import is_collateral
from autotune.trial.host_memory import oom_kills
from autotune.trial.pool import GangResult, NodePool
from tests.trial.gangs import a_request, command, run

REAL = pytest.mark.parametrize(
    ("engine", "zero_stage"), [("pytorch", 3), pytest.param("deepspeed", 2, marks=pytest.mark.slow)]
)
BOTH = pytest.mark.parametrize(
    ("engine", "zero_stage"), [("pytorch", 0), pytest.param("deepspeed", 3, marks=pytest.mark.slow)]
)
SHORT = MeasureSettings(micro_steps=3)


def fail(pool: NodePool, request: TrialRequest, record: Callable[[str, object], None]) -> RankFailure:
    """The failure of a trial that must not need its stall to be noticed, and after which another one runs."""
    started = time.monotonic()
    result = run(pool, request)
    seconds = time.monotonic() - started
    assert result.failure is not None
    assert result.ranks == ()
    assert result.log_path is not None
    assert Path(result.log_path).exists()
    record(f"{request.config.engine} {request.trial_id}", f"{result.failure.kind} {seconds:.1f} s")
    assert seconds < request.timeout_seconds
    following = a_request(f"after {request.trial_id}", workload=Workload(global_batch_size=4), measure=SHORT)
    assert run(pool, following).failure is None
    return result.failure


@REAL
@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("oom.build@0", FailureKind.OUT_OF_MEMORY, "512.00 MiB"),
        ("oom.forward@1", FailureKind.OUT_OF_MEMORY, "512.00 MiB"),
        ("oom.optimizer@all", FailureKind.OUT_OF_MEMORY, "512.00 MiB"),
        ("late-oom.backward@1", FailureKind.OUT_OF_MEMORY, "512.00 MiB"),
        ("hoard.backward@1", FailureKind.OUT_OF_MEMORY, "Memory limit reached"),
        ("host-hoard.optimizer@0", FailureKind.HOST_OUT_OF_MEMORY, "MemoryError"),
        ("refuse.build@1", FailureKind.INVALID_CONFIG, "not supported"),
        ("infinite.forward@0", FailureKind.NON_FINITE_LOSS, "inf"),
        ("bug.backward@1", FailureKind.CRASH, "no such layer"),
        ("kill.backward@1", FailureKind.CRASH, "SIGKILL"),
        ("segv.forward@0", FailureKind.CRASH, "faulty_engine.py"),
        ("abort.optimizer@1", FailureKind.CRASH, "SIGABRT"),
        ("exit.backward@0", FailureKind.CRASH, "code 3"),
    ],
)
def test_the_rank_that_failed_is_blamed(
    faulty: NodePool,
    engine: Engine,
    zero_stage: int,
    fault: str,
    kind: FailureKind,
    says: str,
    record_property: Callable[[str, object], None],
) -> None:
    request = a_request(f"{fault} {engine}", engine=engine, zero_stage=zero_stage, memory_limit_bytes=96 << 20)
    failure = fail(faulty, request, record_property)
    _, _, where = fault.partition(".")
    phase, _, rank = where.partition("@")
    assert failure.kind is kind
    assert failure.phase == phase or kind is FailureKind.NON_FINITE_LOSS  # read when the micro-step is over
    assert failure.rank in ((0, 1) if rank == "all" else (int(rank),))
    assert says in failure.message
    assert not is_collateral(failure.message)


@BOTH
def test_memory_that_does_not_suffice(
    faulty: NodePool, engine: Engine, zero_stage: int, record_property: Callable[[str, object], None]
) -> None:
    request = a_request(f"too-little {engine}", engine=engine, zero_stage=zero_stage, memory_limit_bytes=6 << 20)
    failure = fail(faulty, request, record_property)
    assert failure.kind is FailureKind.OUT_OF_MEMORY
    assert failure.rank is not None
    assert failure.requested_bytes


@pytest.mark.parametrize(
    ("engine", "zero_stage", "offload"),
    [("pytorch", 1, "none"), ("pytorch", 3, "optimizer"), ("deepspeed", 2, "none")],
)
def test_a_config_that_the_library_refuses(
    faulty: NodePool,
    engine: Engine,
    zero_stage: int,
    offload: Offload,
    record_property: Callable[[str, object], None],
) -> None:
    request = a_request("refused", engine=engine, zero_stage=zero_stage, offload=offload)
    if engine == "deepspeed":
        config = dataclasses.replace(request.config, deepspeed=(("zero_optimization.reduce_bucket_size", -1),))
        request = dataclasses.replace(request, config=config)
    result = run(faulty, request)
    assert result.failure is not None
    assert (result.failure.kind, result.failure.phase) == (FailureKind.INVALID_CONFIG, Phase.BUILD)


@REAL
def test_a_learning_rate_that_diverges(
    faulty: NodePool, engine: Engine, zero_stage: int, record_property: Callable[[str, object], None]
) -> None:
    workload = Workload(global_batch_size=4, learning_rate=1e30)
    request = a_request(f"diverges {engine}", engine=engine, zero_stage=zero_stage, workload=workload)
    assert fail(faulty, request, record_property).kind is FailureKind.NON_FINITE_LOSS


def test_a_host_that_is_too_small_for_what_is_offloaded(
    faulty: NodePool, record_property: Callable[[str, object], None]
) -> None:
    request = a_request("host-hoard.optimizer@1 offload", engine="deepspeed", zero_stage=2, offload="optimizer")
    failure = fail(faulty, request, record_property)
    assert (failure.kind, failure.rank) == (FailureKind.HOST_OUT_OF_MEMORY, 1)


@REAL
def test_a_rank_that_the_kernel_kills_for_memory(
    faulty: NodePool,
    engine: Engine,
    zero_stage: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The counter is a file of the test's; the rank really dies of SIGKILL."""
    counter = faulty._build_cache.folder / "memory.events"
    counter.write_text("oom_kill 0\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    monkeypatch.setattr("autotune.trial.gang.oom_kills", partial(oom_kills, hierarchy=counter.parent, proc=tmp_path))
    request = a_request(f"kernel-kill.backward@1 {engine}", engine=engine, zero_stage=zero_stage)
    failure = fail(faulty, request, record_property)
    assert (failure.kind, failure.rank, failure.phase) == (FailureKind.HOST_OUT_OF_MEMORY, 1, Phase.BACKWARD)


@REAL
def test_a_rank_that_never_comes_to_a_collective(
    faulty: NodePool, engine: Engine, zero_stage: int, record_property: Callable[[str, object], None]
) -> None:
    request = a_request(f"sleep.backward@1 {engine}", engine=engine, zero_stage=zero_stage, stall_seconds=2.0)
    failure = fail(faulty, request, record_property)
    assert (failure.kind, failure.rank) == (FailureKind.HANG, None)
    assert "rank 1 is in backward" in failure.message
    log = Path(faulty._log_dir, request.trial_id, "rank1.log")
    assert "faulty_engine.py" in log.read_text()  # its stack


@REAL
def test_a_process_group_that_gives_up_first(
    faulty: NodePool, engine: Engine, zero_stage: int, record_property: Callable[[str, object], None]
) -> None:
    request = a_request(f"desert.backward@0 {engine}", engine=engine, zero_stage=zero_stage)
    failure = fail(faulty, request, record_property)
    assert (failure.kind, failure.rank) == (FailureKind.HANG, None)  # the rank that waited is not to blame
    assert "rank 1 waited" in failure.message
    assert "rank 0 is in" in failure.message


@REAL
def test_a_watchdog_that_aborts_tells_of_a_hang(
    faulty: NodePool, engine: Engine, zero_stage: int, record_property: Callable[[str, object], None]
) -> None:
    request = a_request(f"watchdog.backward@0 {engine}", engine=engine, zero_stage=zero_stage)
    failure = fail(faulty, request, record_property)
    assert failure.kind is FailureKind.HANG
    assert "Watchdog caught" in failure.message
    assert is_collateral(failure.message)


@pytest.mark.parametrize(("phase", "kind"), [("build", None), ("forward", FailureKind.HANG)])
def test_silence_is_borne_while_the_model_is_built(faulty: NodePool, phase: str, kind: FailureKind | None) -> None:
    failure = run(faulty, a_request(f"doze.{phase}@1", stall_seconds=1.5)).failure
    assert (failure and failure.kind) == kind


def test_a_build_that_hangs_ends_at_the_deadline(faulty: NodePool) -> None:
    failure = run(faulty, a_request("sleep.build@all", timeout_seconds=3.0, stall_seconds=1.5)).failure
    assert failure is not None
    assert (failure.kind, failure.phase) == (FailureKind.HANG, Phase.BUILD)


def test_a_slow_trial_that_progresses_is_a_timeout(faulty: NodePool) -> None:
    measure = MeasureSettings(micro_steps=1000)
    failure = run(faulty, a_request("slow.forward@0", timeout_seconds=3.0, stall_seconds=2.9, measure=measure)).failure
    assert failure is not None
    assert failure.kind is FailureKind.TIMEOUT


def test_what_a_rank_started_is_killed_with_it_whatever_its_session(faulty: NodePool) -> None:
    assert run(faulty, a_request("grandchildren.forward@0")).failure is not None
    assert not [process for process in psutil.process_iter() if command(process) == "sleep 1000"]


def test_shared_memory_that_ranks_had_no_time_to_unlink_is_unlinked(faulty: NodePool) -> None:
    result = run(faulty, a_request("share.forward@all"))
    assert result.failure is not None
    assert result.failure.kind is FailureKind.OUT_OF_MEMORY


def test_a_gang_ends_with_the_process_that_it_runs_for(faulty: NodePool) -> None:
    results: list[GangResult] = []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as owner:
        request = a_request("sleep.forward@0 owned")
        thread = threading.Thread(target=lambda: results.append(run(faulty, request, owner_pid=owner.pid)))
        thread.start()
        log = Path(faulty._log_dir, request.trial_id, "rank0.log")
        while not (log.exists() and "asleep" in log.read_text()):
            time.sleep(0.05)
        owner.kill()
        thread.join(10)
    assert results[0].failure is not None
    assert results[0].failure.kind is FailureKind.WORKER_LOST
    assert "the trial was run for" in results[0].failure.message
    failure = run(faulty, a_request("of nobody"), owner_pid=owner.pid).failure
    assert failure is not None
    assert failure.kind is FailureKind.WORKER_LOST


def test_gpus_are_taken_from_a_gang_that_ray_has_taken_them_from(faulty: NodePool) -> None:
    results: dict[str, GangResult] = {}

    def start(trial_id: str, gpu_ids: list[str]) -> threading.Thread:
        def body() -> None:
            results[trial_id] = faulty.run(
                a_request(trial_id),
                ranks=[0, 1],
                world_size=2,
                master_address="127.0.0.1",
                master_port=faulty.free_port(),
                gpu_ids=gpu_ids,
            )

        thread = threading.Thread(target=body)
        thread.start()
        return thread

    first = start("sleep.build@all first", ["0", "1"])
    elsewhere = start("elsewhere", ["4", "5"])
    while "sleep.build@all first" not in faulty._gangs:
        time.sleep(0.01)
    second = start("second", ["1", "2"])
    for thread in (first, elsewhere, second):
        thread.join(60)
    kinds = {trial_id: result.failure and result.failure.kind for trial_id, result in results.items()}
    assert kinds == {"sleep.build@all first": FailureKind.INTERRUPTED, "second": None, "elsewhere": None}


def test_the_owner_is_this_process_while_it_lives(faulty: NodePool) -> None:
    assert run(faulty, a_request("owned", measure=SHORT), owner_pid=os.getpid()).failure is None


def test_ranks_stop_together_when_one_of_them_is_hopeless(faulty: NodePool) -> None:
    """Rank 1 is slow, rank 0 is not, and only accumulates: no collective of the step tells it so."""
    request = a_request("slow.forward@1", measure=MeasureSettings(micro_steps=8), most_step_seconds=0.6)
    result = run(faulty, request)
    assert result.failure is None, result.failure
    assert [rank.stopped_early for rank in result.ranks] == [True, True]
    assert len({len(rank.losses) for rank in result.ranks}) == 1
    assert len(result.ranks[0].losses) < 2 + 8
    outcome = conclude(result.ranks, request, find_gpu("cpu"))
    assert isinstance(outcome, Failure)
    assert outcome.most_tokens_per_second_per_gpu is not None
    # 16 sequences of 64 tokens on two ranks, in at least 0.6 s.
    assert outcome.most_tokens_per_second_per_gpu < 16 * 64 / 2 / 0.6
