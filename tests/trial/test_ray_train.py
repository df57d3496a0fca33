"""The second launcher: what it decides without Ray, and that it finds out what the pool finds out."""

import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from autotune.predict.memory import CPU_DEVIATION, predict_memory
from autotune.search.runner import LauncherName
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import ENGINES
from autotune.spec.outcome import FailureKind, Phase, RankFailure
from autotune.trial.child import Progress
from autotune.trial.ray_train import RESERVATION, room
from autotune.trial.train_watch import Ended, Event, Rank, watch
from tests.samples import measurement, sample_space
from tests.trial.gangs import ROOT, a_request

SCRIPT = Path(__file__).with_name("under_ray_train.py")
GONE = "RuntimeError: Connection closed by peer [127.0.0.1]:35421"
LATE = "RuntimeError: Timed out waiting 20000ms for recv operation to complete"
OUT_OF_MEMORY = RankFailure(rank=1, kind=FailureKind.OUT_OF_MEMORY, phase=Phase.BACKWARD, message="no memory")


def progress(phase: Phase) -> Progress:
    return Progress(phase=phase, phase_seconds={"start": 1.0})


def survivor(message: str) -> RankFailure:
    return RankFailure(rank=0, kind=FailureKind.CRASH, phase=Phase.BACKWARD, message=message)


def decide(
    *said: Event, explanation: RankFailure | None = None, phase: Phase = Phase.FORWARD, **limits: float
) -> RankFailure | None:
    """What is decided on two ranks that are in `phase` and then say this, and nothing more."""
    events: queue.Queue[Event] = queue.Queue()
    for event in ((0, progress(phase)), (1, progress(phase)), *said):
        events.put(event)
    request = dataclasses.replace(a_request("x"), **limits)  # type: ignore[arg-type]
    return watch([Rank(), Rank()], events, request, started=time.monotonic(), explain=lambda: explanation)


def delivered(rank: int) -> Event:
    return rank, dataclasses.replace(measurement().ranks[0], rank=rank)


def test_every_rank_has_to_deliver() -> None:
    assert decide(delivered(0), delivered(1)) is None
    one_missing = decide(delivered(0), (0, Ended()))
    assert one_missing is not None
    assert one_missing.kind is FailureKind.WORKER_LOST


def test_the_first_verdict_counts() -> None:
    later = dataclasses.replace(OUT_OF_MEMORY, rank=0)
    assert decide((1, OUT_OF_MEMORY), (0, later)) is OUT_OF_MEMORY
    assert decide((0, later), (1, OUT_OF_MEMORY)) is later


def test_survivors_wait_for_the_verdict_of_the_rank_that_failed() -> None:
    assert decide((0, survivor(GONE)), (1, OUT_OF_MEMORY)) is OUT_OF_MEMORY
    killed = RankFailure(rank=1, kind=FailureKind.CRASH, phase=Phase.FORWARD, message="rank 1 died")
    assert decide((0, survivor(GONE)), (0, Ended()), explanation=killed) is killed


def test_a_survivor_counts_where_nobody_knows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.trial.train_watch.SURVIVOR_SECONDS", 0.1)
    gone = survivor(GONE)
    assert decide((0, gone)) is gone
    assert decide((0, gone), (0, Ended())) is gone
    waited = decide((0, dataclasses.replace(survivor(LATE), kind=FailureKind.HANG)))
    assert waited is not None
    assert (waited.kind, waited.rank) == (FailureKind.HANG, None)
    assert "rank 0 waited" in waited.message


@pytest.mark.parametrize(
    ("phase", "stall", "timeout", "kind"),
    [
        (Phase.FORWARD, 0.2, 5.0, FailureKind.HANG),
        (Phase.FORWARD, 5.0, 0.2, FailureKind.TIMEOUT),
        (Phase.BUILD, 5.0, 0.2, FailureKind.TIMEOUT),
        (Phase.BUILD, 0.1, 0.3, FailureKind.HANG),  # silence is allowed, the deadline is not
    ],
)
def test_silence_and_deadline(phase: Phase, stall: float, timeout: float, kind: FailureKind) -> None:
    started = time.monotonic()
    failure = decide(phase=phase, stall_seconds=stall, timeout_seconds=timeout)
    assert failure is not None
    assert (failure.kind, failure.phase, failure.rank) == (kind, phase, None)
    assert f"rank 1 is in {phase}" in failure.message
    assert time.monotonic() - started >= (max(stall, timeout) if phase is Phase.BUILD and stall < 1 else 0.2)


def test_ranks_that_never_start_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.trial.train_watch.READY_SECONDS", 0.1)
    request = dataclasses.replace(a_request("x"), stall_seconds=0.01, timeout_seconds=0.01)
    failure = watch([Rank()], queue.Queue(), request, started=time.monotonic(), explain=lambda: None)
    assert failure is not None
    assert (failure.kind, failure.phase) == (FailureKind.WORKER_LOST, Phase.START)


@pytest.mark.parametrize(
    ("nodes", "gpus_per_node", "gpus", "trials"),
    [(1, 8, 8, 1), (1, 8, 3, 2), (2, 8, 5, 2), (2, 8, 1, 16), (4, 8, 16, 2), (3, 8, 16, 1), (1, 2, 4, 0)],
)
def test_as_many_trials_as_whole_ones_have_room(nodes: int, gpus_per_node: int, gpus: int, trials: int) -> None:
    assert room(ClusterSpec(nodes=nodes, gpus_per_node=gpus_per_node, gpu=find_gpu("H100-80GB")), gpus) == trials


def test_the_driver_of_a_trial_takes_no_gpu_and_no_core_from_its_ranks() -> None:
    assert RESERVATION.required_resources.keys().isdisjoint({"CPU", "GPU"})


def compared_space(folder: Path) -> Path:
    """A file of what fits, of one config for each engine, and of what runs out of memory.

    No trial that surely does not fit is launched, so that the device has a little less than the smaller of the two
    large configs needs, within what a prediction may be off by; the other one needs nearly the same.
    """
    changes: dict[str, Any] = {
        "cluster": {"nodes": 1, "gpus_per_node": 2, "gpu": "cpu", "memory_bytes": "1GiB"},
        "workload": {"global_batch_size": 64, "sequence_length": 128},
        "memory_headroom": 0.0,
        # No trial is ended for being slow.
        "objective": {"minimize": "peak_device_used_bytes"},
        "search": {
            "engine": ["deepspeed", "pytorch"],
            "precision": "fp32",
            "zero_stage": 2,
            "activation_checkpointing": "none",
            "micro_batch_size": [2, 32],
            "deepspeed": {
                "zero_optimization.reduce_bucket_size": 100000,
                "zero_optimization.allgather_bucket_size": 100000,
            },
        },
        "baseline": ...,
        "budget": {"trials": 6, "stop_below_gain": 0},
    }
    space = sample_space(folder, **changes)
    large = [config for config in space.candidates if config.micro_batch_size == 32]
    needs = min(
        predict_memory(config, space.model, space.workload, space.cluster).device_used_bytes for config in large
    )
    changes["cluster"]["memory_bytes"] = round(needs * (1 - CPU_DEVIATION / 2))
    return Path(sample_space(folder, **changes).where)


def tune(folder: Path, space: Path, launcher: LauncherName) -> dict[tuple[str, int], dict[str, Any]]:
    """Tune a space; the outcomes by engine and micro-batch size."""
    store = ["--store", f"sqlite:///{folder}/{launcher}.db", "--json"]
    command = ["tune", str(space), "--out", str(folder / launcher), "--launcher", launcher]
    # What is left in the home or as temporary files is seen. Ray's own files are not ours, and its sockets want a short
    # path.
    places = {"HOME": str(folder), "TMPDIR": str(folder), "RAY_TMPDIR": tempfile.gettempdir()}
    environment = {**os.environ, **places, "PYTHONPATH": ROOT}
    tuned = autotune(*command, *store, environment=environment)
    assert tuned.returncode == 0, tuned.stderr
    assert len(tuned.stdout.splitlines()) == 1  # nothing of Ray's
    assert json.loads(tuned.stdout)["trials"]["failed"] == 0
    shown = json.loads(autotune("show", "sample", *store, environment=environment).stdout)
    return {(t["config"]["engine"], t["config"]["micro_batch_size"]): t["outcome"] for t in shown["trials"]}


def autotune(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autotune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_both_launchers_find_out_the_same(tmp_path: Path) -> None:
    space = compared_space(tmp_path)
    pool, train = (tune(tmp_path, space, launcher) for launcher in (LauncherName.POOL, LauncherName.RAY_TRAIN))
    assert {engine for (engine, _), outcome in pool.items() if outcome["outcome"] == "measurement"} == set(ENGINES)
    assert [o["kind"] for o in pool.values() if o["outcome"] == "failure"] == ["out_of_memory"] * len(ENGINES)
    assert len(pool) == 4
    assert pool.keys() == train.keys()
    for config, expected in pool.items():
        found = train[config]
        assert found["outcome"] == expected["outcome"], (config, found)
        assert found["elapsed_seconds"] > 0
        assert Path(found["log_path"]).exists()
        if expected["outcome"] == "failure":
            for name in ("kind", "phase", "message", "requested_bytes"):
                assert found[name] == expected[name]
            assert found["rank"] in (0, 1)
            assert set(found["phase_seconds"]) == set(expected["phase_seconds"])
            continue
        # Equal to the byte, unless a tensor in a reference cycle waits for Python's collector, whose moment is chance.
        peak = pytest.approx(expected["peak_memory_allocated_bytes"], rel=0.02)
        assert found["peak_memory_allocated_bytes"] == peak
        assert set(found["phase_seconds"]) == set(expected["phase_seconds"])
        for ours, theirs in zip(found["ranks"], expected["ranks"], strict=True):
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
            assert ours["environment"] == theirs["environment"]
    assert not (tmp_path / "ray_results").exists()
    assert not list(tmp_path.glob("autotune-*"))


FAULTS = {
    "refuse.build@1": ("invalid_config", "build", 1, "not supported"),
    "infinite.forward@0": ("non_finite_loss", "backward", 0, "inf"),
    "oom.optimizer@1": ("out_of_memory", "optimizer", 1, "512.00 MiB"),
    "late-oom.backward@1": ("out_of_memory", "backward", 1, "512.00 MiB"),
    "grandchildren.backward@0": ("out_of_memory", "backward", 0, "512.00 MiB"),
    "kill.forward@1": ("crash", None, 1, "rank 1 died"),
    "segv.backward@0": ("crash", None, 0, "faulty_engine.py"),
    "sleep.backward@0": ("hang", "backward", None, "rank 0 is in backward"),
    "slow.forward@0": ("timeout", None, None, "not finished after"),
}


def run_faults(folder: Path, *trials: str, cores: int = 2, **variables: str) -> list[dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(cores), *trials],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ROOT, "XDG_CACHE_HOME": str(folder), **variables},
    )
    assert run.returncode == 0, run.stderr
    outcomes: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return outcomes


@pytest.mark.slow
def test_a_group_that_finds_no_room_is_lost(tmp_path: Path) -> None:
    (lost,) = run_faults(tmp_path, "fine", cores=1, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="2")
    assert (lost["kind"], lost["phase"], lost["rank"]) == ("worker_lost", "start", None)
    assert "WorkerGroupStartupTimeoutError" in lost["message"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_fault_is_classified_and_the_next_trial_runs(tmp_path: Path) -> None:
    *failed, fine = run_faults(tmp_path, *FAULTS, "fine")
    assert fine["outcome"] == "measurement", fine
    for (fault, (kind, phase, rank, says)), found in zip(FAULTS.items(), failed, strict=True):
        assert found["outcome"] == "failure", (fault, found)
        assert found["kind"] == kind, (fault, found)
        assert phase in (None, found["phase"]), (fault, found)
        assert found["rank"] == rank, (fault, found)
        assert says in found["message"], (fault, found)
        assert found["left"] == [], (fault, found)
        assert (found["requested_bytes"] == 512 << 20) == (kind == "out_of_memory"), (fault, found)
        assert Path(found["log_path"]).exists(), (fault, found)
    hang = failed[list(FAULTS).index("sleep.backward@0")]
    assert "faulty_engine.py" in Path(hang["log_path"]).read_text()
