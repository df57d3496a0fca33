"""Real processes: what a gang does when one rank of it fails, and that nothing is left of it."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import psutil
import pytest

from autotune.spec.config import Engine
from autotune.spec.outcome import FailureKind, Phase
from autotune.trial import child
from autotune.trial.failure import is_collateral
from autotune.trial.pool import GangResult, NodePool, trial_environment
from tests.trial.gangs import ROOT, a_request, fork_family, run


@pytest.mark.parametrize(("engine", "zero_stage"), [("pytorch", 0), ("pytorch", 3), ("deepspeed", 2)])
def test_real_engines_are_measured(pool: NodePool, engine: Engine, zero_stage: int) -> None:
    result = run(pool, a_request(f"{engine}-{zero_stage}", engine=engine, zero_stage=zero_stage))
    assert result.failure is None
    assert [rank.rank for rank in result.ranks] == [0, 1]
    for rank in result.ranks:
        assert (len(rank.micro_step_seconds), len(rank.update_step_seconds), len(rank.losses)) == (4, 2, 8)
        assert 0 < rank.peak_memory_allocated_bytes == rank.peak_device_used_bytes < rank.device_memory_bytes == 1 << 30
        assert list(rank.phase_seconds) == ["start", "build", "warmup", "measure"]
        assert rank.environment["torch"]
    assert result.ranks[0].losses != result.ranks[1].losses
    assert result.log_path is not None
    assert Path(result.log_path).exists()


def test_equal_requests_measure_equal_losses_and_bytes(pool: NodePool) -> None:
    first, second = (run(pool, a_request(f"again-{i}")).ranks for i in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.losses, a.peak_memory_allocated_bytes) == (b.losses, b.peak_memory_allocated_bytes)


def test_a_memory_limit_is_exact(pool: NodePool) -> None:
    peak = max(rank.peak_memory_allocated_bytes for rank in run(pool, a_request("free")).ranks)
    assert run(pool, a_request("fits", memory_limit_bytes=peak)).failure is None
    failure = run(pool, a_request("short", memory_limit_bytes=peak - 1)).failure
    assert failure is not None
    assert failure.kind is FailureKind.OUT_OF_MEMORY
    assert failure.phase in (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)
    assert failure.requested_bytes


def test_cancel_ends_a_running_trial(faulty: NodePool) -> None:
    results: list[GangResult] = []
    thread = threading.Thread(target=lambda: results.append(run(faulty, a_request("sleep.backward@1"))))
    thread.start()
    time.sleep(0.5)
    assert faulty.cancel("sleep.backward@1")
    thread.join(5)
    assert results[0].failure is not None
    assert results[0].failure.kind is FailureKind.INTERRUPTED
    assert not faulty.cancel("sleep.backward@1")


def test_trials_run_side_by_side_and_do_not_disturb_each_other(faulty: NodePool) -> None:
    ids = ["fine-1", "oom.backward@0", "fine-2", "kill.backward@1"]
    results: dict[str, GangResult] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: run(faulty, a_request(i))})) for i in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    kinds = {trial: result.failure and result.failure.kind for trial, result in results.items()}
    assert kinds == {
        "fine-1": None,
        "fine-2": None,
        "oom.backward@0": FailureKind.OUT_OF_MEMORY,
        "kill.backward@1": FailureKind.CRASH,
    }


def test_a_failure_on_another_node_is_known_as_collateral(faulty: NodePool) -> None:
    """Two calls are two nodes: each runs some ranks, and sees of the other's failure only closed connections."""
    port = faulty.free_port()
    results: dict[int, GangResult] = {}

    def node(rank: int) -> None:
        request = a_request("kill.backward@1" if rank == 1 else "fine-3")
        results[rank] = faulty.run(request, ranks=[rank], world_size=2, master_address="127.0.0.1", master_port=port)

    threads = [threading.Thread(target=node, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    collateral, cause = results[0].failure, results[1].failure
    assert cause is not None
    assert collateral is not None
    assert (is_collateral(cause.message), is_collateral(collateral.message)) == (False, True)


def test_ports_differ(faulty: NodePool) -> None:
    assert len({faulty.free_port() for _ in range(50)}) == 50


def test_a_request_for_another_device_is_refused(faulty: NodePool) -> None:
    with pytest.raises(ValueError, match="cuda"):
        run(faulty, a_request("wrong", device="cuda"))


PRELOAD_WITHOUT_CUDA = """
import os, sys, threading, torch
def reached(*args, **kwargs):
    raise SystemExit("the preload reaches CUDA")
torch.cuda.is_available = torch.cuda._lazy_init = torch.cuda.device_count = reached
import autotune.trial.preload
assert not torch.cuda.is_initialized()
assert "transformers.models.qwen3.modeling_qwen3" in sys.modules and "deepspeed" in sys.modules
threads = len(os.listdir("/proc/self/task"))
assert threads == 1, f"the preload starts {threads - 1} threads"
"""


def test_the_preload_touches_no_cuda_starts_no_thread_and_leaves_torchao_to_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("import torch\ntorch.cuda.is_available()\n")
    (tmp_path / "torchao-0.18.0.dist-info").mkdir()
    (tmp_path / "torchao-0.18.0.dist-info" / "METADATA").write_text("Name: torchao\nVersion: 0.18.0\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | trial_environment("cuda", "/nonexistent") | {"PYTHONPATH": paths}
    later = "assert importlib.util.find_spec('torchao') is not None"
    command = f"import importlib.util\n{PRELOAD_WITHOUT_CUDA}\n{later}"
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_fork_server_with_initialised_cuda_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "autotune.trial.preload", types.ModuleType("preload"))
    assert child._what_is_wrong() == ""
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    assert "CUDA" in child._what_is_wrong()


# Without the usual guard: children that ran it again would show in its output, or start children in turn.
SPAWN_FALLBACK = """
import sys
print("main runs")
import autotune.trial.pool as pool_module
pool_module.PRELOAD = "broken_preload"
from tests.trial.gangs import FAULTY, a_request, run
pool = pool_module.NodePool(device="cpu", log_dir={logs!r}, engine=FAULTY)
print(pool.ready())
print(run(pool, a_request("compile.build@1")).failure.kind, pool._build_cache.folder)
pool.shutdown()
"""


def test_without_a_fork_server_ranks_are_spawned_and_the_lock_of_a_killed_build_is_removed(tmp_path: Path) -> None:
    (tmp_path / "broken_preload.py").write_text("raise RuntimeError('no fork server today')")
    script = SPAWN_FALLBACK.format(logs=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT])}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    main = tmp_path / "main.py"
    main.write_text(script)
    done = subprocess.run([sys.executable, main], env=environment, capture_output=True, text=True)
    _, ready, outcome = done.stdout.splitlines()
    assert "'start_method': 'spawn'" in ready
    assert "fork server does not work" in ready
    kind, build_folder = outcome.split()
    assert kind == "crash"
    assert [path.name for path in Path(build_folder).iterdir() if path.is_dir()] == ["cpu_adam"]
    assert not list(Path(build_folder).glob("**/lock"))


KILLED_POOL = """
from autotune.trial.pool import NodePool
from tests.trial.gangs import FAULTY, a_request, run
pool = NodePool(device="cpu", log_dir={logs!r}, engine=FAULTY)
print(pool.ready(), flush=True)
run(pool, a_request("sleep.backward@0"))
"""


def test_ranks_do_not_outlive_the_pool(tmp_path: Path) -> None:
    script = KILLED_POOL.format(logs=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": ROOT, "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as pool:
        assert pool.stdout is not None
        assert "forkserver" in pool.stdout.readline()
        time.sleep(1.5)
        family = fork_family(pool.pid)
        assert len(family) == 3
        os.kill(pool.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_ranks_do_not_outlive_the_fork_server_and_a_new_one_starts(pools: dict[str, NodePool]) -> None:
    results: list[GangResult] = []
    thread = threading.Thread(target=lambda: results.append(run(pools["faulty"], a_request("sleep.backward@0"))))
    thread.start()
    time.sleep(1.0)
    family = fork_family(os.getpid())
    assert len(family) == 3
    os.kill(family[0].pid, signal.SIGKILL)
    thread.join(10)
    assert results[0].failure is not None
    assert results[0].failure.kind is FailureKind.WORKER_LOST
    assert not [process for process in family[1:] if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert run(pools["faulty"], a_request("fine-4")).failure is None
