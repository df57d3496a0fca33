"""`autotune doctor`: every check on what it is for, and the real command on this machine."""

import contextlib
import json
import os
import resource
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from autotune.doctor import gpus, machine, probe, services, software
from autotune.doctor.check import Finding, Status, fail, ok, perform, warn
from autotune.doctor.gpus import Driver, Gpu
from autotune.store.store import open_store
from autotune.units import GIB

ROOT = Path(__file__).parents[1]


def is_(finding: Finding, status: Status, *words: str) -> bool:
    """A finding of this status, with its remedy exactly if there is something to do, that has the words."""
    assert finding.status is status, finding
    assert (finding.remedy is None) == (status is Status.OK)
    for word in words:
        assert word in f"{finding.found} → {finding.remedy}"
    return True


# The frame


def test_a_check_that_breaks_is_a_finding_in_one_line() -> None:
    def broken() -> Finding:
        raise OSError("two\nlines")

    check = perform("disk", broken)
    assert (check.name, check.status, check.found) == (
        "disk",
        Status.FAIL,
        "the check itself failed: OSError: two lines",
    )
    assert check.remedy
    assert perform("fine", lambda: ok("all\n well")).to_dict() == {
        "name": "fine", "status": "ok", "found": "all well", "remedy": None,
    }  # fmt: skip


def test_findings_have_the_status_of_their_names() -> None:
    assert [ok("a").status, warn("a", "b").status, fail("a", "b").status] == [Status.OK, Status.WARN, Status.FAIL]


# GPUs


class FakeNvml:
    """Two H100, as `pynvml` shows them."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_COMPUTEMODE_DEFAULT, NVML_COMPUTEMODE_PROHIBITED = 0, 2
    NVML_DEVICE_MIG_ENABLE, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 1, 0

    def __init__(self, *, driver: bool = True, users: Any = (), mode: int = 0, mig: int = 0, errors: int = 0) -> None:
        self.there, self.users, self.mode, self.mig, self.errors = driver, users, mode, mig, errors
        self.open = False

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.there:
            raise self.NVMLError("no driver")
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open = False

    def __getattr__(self, name: str) -> Any:
        def not_supported(*_: object) -> None:
            raise self.NVMLError("not supported")

        answers: dict[str, Any] = {
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
            "nvmlSystemGetDriverVersion": lambda: "570.86",
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda _: "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=80 * GIB, used=GIB),
            "nvmlDeviceGetCudaComputeCapability": lambda _: (9, 0),
            "nvmlDeviceGetComputeRunningProcesses": lambda index: self.users if index else [],
            "nvmlDeviceGetComputeMode": lambda _: self.mode,
            "nvmlDeviceGetMigMode": (lambda _: [self.mig, self.mig]) if self.mig else not_supported,
            "nvmlDeviceGetTotalEccErrors": lambda *_: self.errors,
        }
        return answers[name]


def h100(**changes: Any) -> Gpu:
    fields: dict[str, Any] = {
        "index": 0, "name": "NVIDIA H100 80GB HBM3", "capability": (9, 0), "total_bytes": 80 * GIB, "used_bytes": GIB,
        "users": (), "prohibited": False, "mig": False, "uncorrected_errors": 0,
    }  # fmt: skip
    return Gpu(**(fields | changes))


def driver(*cards: Gpu, cuda: tuple[int, int] = (12, 8)) -> Driver:
    return Driver(version="570.86", cuda=cuda, gpus=cards or (h100(),))


def test_nvml_is_read_and_closed_again() -> None:
    nvml = FakeNvml()
    found = gpus.read_driver(nvml)
    assert found == driver(h100(), h100(index=1))
    assert not nvml.open
    assert gpus.read_driver(FakeNvml(driver=False)) is None


def test_gpus_that_others_use_are_named_with_who() -> None:
    me = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=10 * GIB), SimpleNamespace(pid=2**22 - 1, usedGpuMemory=None)]
    name = psutil.Process().name()
    finding = gpus.check_gpus(gpus.read_driver(FakeNvml(users=me)))
    assert is_(finding, Status.WARN, f"GPU 1 by {name} (pid {os.getpid()}, 10.0 GiB), a process (pid {2**22 - 1})")
    assert is_(gpus.check_gpus(driver(h100(used_bytes=30 * GIB))), Status.WARN, "cannot be seen", "30.0 GiB")
    assert is_(gpus.check_gpus(driver()), Status.OK, "1 x NVIDIA H100 80GB HBM3, driver 570.86")


def test_gpus_that_are_not_fit_for_trials() -> None:
    assert is_(gpus.check_gpus(gpus.read_driver(FakeNvml(mode=2))), Status.FAIL, "prohibited on GPU 0, 1", "DEFAULT")
    assert is_(gpus.check_gpus(gpus.read_driver(FakeNvml(errors=3))), Status.FAIL, "ECC")
    assert is_(gpus.check_gpus(gpus.read_driver(FakeNvml(mig=1))), Status.WARN, "MIG", "-mig 0")
    assert is_(gpus.check_gpus(driver(h100(), h100(name="L40S"))), Status.WARN, "differ", "CUDA_VISIBLE_DEVICES")


def test_a_gpu_without_a_driver(tmp_path: Path) -> None:
    assert is_(gpus.check_gpus(None, tmp_path), Status.OK, "gpu: cpu")
    for number, (vendor, kind) in enumerate([("0x10de", "0x030200"), ("0x8086", "0x030000"), ("0x10de", "0x040300")]):
        device = tmp_path / f"0000:0{number}:00.0"
        device.mkdir()
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    assert is_(gpus.check_gpus(None, tmp_path), Status.FAIL, "1 NVIDIA GPU on the bus", "install the NVIDIA driver")


# Software


def libraries(**changes: Any) -> dict[str, Any]:
    fields = {
        "torch": "2.13.0", "cuda": "12.8", "hip": None, "nccl": "2.27.3", "deepspeed": "0.19.8",
        "architectures": ["sm_80", "sm_90", "compute_90"],
        "built_ops": [], "buildable_ops": ["cpu_adam", "fused_adam"],
        "known_ops": ["async_io", "cpu_adam", "fused_adam"],
    }  # fmt: skip
    return fields | changes


def test_pythons() -> None:
    assert is_(software.check_python(), Status.OK, "Python 3.")
    assert is_(software.check_python((3, 10, 2)), Status.FAIL, "3.10.2", "3.11")


def test_packages_are_held_against_what_the_project_declares() -> None:
    assert is_(software.check_packages(), Status.OK, "torch 2.", "ray 2.", "optuna 5.")
    needs = ["torch>=999", "no-such-package-of-ours", "psycopg>=999; extra == 'postgres'", "numpy>=1"]
    finding = software.check_packages(needs)
    assert is_(finding, Status.FAIL, "torch 2.", "is not >=999; no-such-package-of-ours is missing", "pip install")
    assert "psycopg" not in finding.found


def test_code_that_a_job_brought_along_has_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "DISTRIBUTION", "no-such-package-of-ours")
    assert is_(software.check_packages(), Status.OK, "from a folder")
    monkeypatch.setattr(software, "_IMPORTED", ("json", "no_such_module_of_ours"))
    assert is_(software.check_packages(), Status.FAIL, "no_such_module_of_ours cannot be imported")


@pytest.mark.parametrize(
    ("changes", "cards", "status", "words"),
    [
        ({}, driver(), Status.OK, "CUDA 12.8, NCCL 2.27.3"),
        ({"cuda": None, "nccl": None}, None, Status.OK, "CPU only"),
        ({"cuda": None, "hip": "7.0"}, None, Status.OK, "ROCm 7.0"),
        ({"cuda": None}, driver(), Status.FAIL, "CUDA 12.8 or older"),
        ({"cuda": "13.0"}, driver(), Status.FAIL, "runs CUDA up to 12.8"),
        ({"cuda": "12.9"}, driver(), Status.OK, "CUDA 12.9"),
        ({"nccl": None}, driver(), Status.FAIL, "no NCCL"),
        ({"architectures": ["sm_70", "sm_80"]}, driver(), Status.FAIL, "sm_90"),
        ({"architectures": ["sm_80"]}, driver(h100(capability=(8, 6))), Status.OK, ""),
        ({"architectures": ["sm_89"]}, driver(h100(capability=(8, 6))), Status.FAIL, "sm_86"),
        ({"architectures": ["sm_100a", "compute_80"]}, driver(), Status.OK, ""),
    ],
)
def test_torch_against_driver_and_gpus(
    changes: dict[str, Any], cards: Driver | None, status: Status, words: str
) -> None:
    assert is_(software.check_torch(libraries(**changes), cards), status, words)


def test_ops_that_trials_need() -> None:
    assert is_(software.check_ops(libraries(), driver()), Status.OK, "0 ops built, 2 can be built, not async_io")
    lacking = libraries(buildable_ops=["cpu_adam"])
    assert is_(software.check_ops(lacking, driver()), Status.FAIL, "fused_adam", "ds_report")
    assert is_(software.check_ops(lacking, None), Status.OK)


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert is_(software.check_compilers(libraries(), None), Status.OK, "nvcc missing", "nothing")
    assert is_(software.check_compilers(libraries(), driver()), Status.FAIL, "install ninja, C++, nvcc")
    built = libraries(built_ops=["cpu_adam", "fused_adam"])
    assert is_(software.check_compilers(built, driver()), Status.OK)
    for name, text in (("ninja", ""), ("c++", ""), ("nvcc", "echo Cuda compilation tools, release 12.6, V12.6.20")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    assert is_(software.check_compilers(libraries(), driver()), Status.OK, "CUDA 12.6")
    assert is_(software.check_compilers(libraries(cuda="13.0"), driver()), Status.FAIL, "CUDA 12.6", "CUDA_HOME")


def test_how_ranks_start() -> None:
    assert is_(software.check_ranks({"start_method": "forkserver", "reason": "CUDA untouched"}), Status.OK, "by fork")
    spawned = {"start_method": "spawn", "reason": "the preload has initialised CUDA"}
    assert is_(software.check_ranks(spawned), Status.WARN, "initialised CUDA", "all the same")


def test_a_probe_that_dies_or_hangs_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="no-such-question"):
        probe.ask("no-such-question", "cpu", seconds=60)
    with pytest.raises(RuntimeError, match="no answer within 0 s"):
        probe.ask("ranks", "cpu", seconds=0.01)


# The machine


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path


def test_the_output_folder_is_examined_and_not_made(here: Path) -> None:
    assert is_(machine.check_output(here / "a" / "b"), Status.OK, "free")
    assert is_(machine.check_output(here / "file" / "b"), Status.FAIL, "cannot be written", "--out")
    assert is_(machine.check_output(here, needed_bytes=2**70), Status.FAIL, "free", "another disk")
    assert [path.name for path in here.iterdir()] == ["file"]


def test_rays_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.ray_folder({}) == Path("/tmp/ray")
    assert machine.ray_folder({"TMPDIR": "/a", "RAY_TMPDIR": "/b"}) == Path("/b/ray")
    assert is_(machine.check_ray_folder(Path("/tmp/ray")), Status.OK, "free")
    assert is_(machine.check_ray_folder(Path("/tmp") / ("x" * 60) / "ray"), Status.FAIL, "too long", "RAY_TMPDIR")
    assert is_(machine.check_ray_folder(here / "file" / "ray"), Status.FAIL, "cannot be written", "RAY_TMPDIR")
    monkeypatch.setattr(machine, "RAY_FREE_SHARE", 1.1)
    assert is_(machine.check_ray_folder(Path("/tmp/ray")), Status.WARN, "95 %")


def test_the_model_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.model_folder({}) == Path.home() / ".cache/huggingface/hub"
    assert machine.model_folder({"HF_HOME": "/models"}) == Path("/models/hub")
    assert machine.model_folder({"HF_HOME": "/models", "HF_HUB_CACHE": "/hub"}) == Path("/hub")
    assert is_(machine.check_model_folder(tmp_path / "none"), Status.OK, "free")
    monkeypatch.setattr(machine, "GIB", 2**70)
    assert is_(machine.check_model_folder(tmp_path), Status.WARN, "HF_HOME")


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_(machine.check_shared_memory(tmp_path / "shm"), Status.FAIL, "is missing")
    assert is_(machine.check_shared_memory(tmp_path), Status.OK)
    monkeypatch.setattr(machine, "GIB", 2**70)
    assert is_(machine.check_shared_memory(tmp_path), Status.WARN, "--shm-size")


def test_host_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    assert is_(machine.check_host_memory(tmp_path), Status.OK, "of the host's")
    (tmp_path / "memory.max").write_text("max\n")
    assert is_(machine.check_host_memory(tmp_path), Status.OK, "of the host's")
    (tmp_path / "memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    assert is_(machine.check_host_memory(tmp_path), Status.WARN, "2.0 GiB of the container's 3.0 GiB")
    (tmp_path / "memory.current").write_text(f"{3 * GIB - 1}\n")
    assert is_(machine.check_host_memory(tmp_path), Status.FAIL, "1 B of the container's")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (1024, 65536), resource.RLIMIT_MEMLOCK: (65536, -1)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert is_(machine.check_limits(tmp_path), Status.OK, "open files 65536, locked memory 64.0 KiB")
    (tmp_path / "mlx5_0").mkdir()
    assert is_(machine.check_limits(tmp_path), Status.WARN, "InfiniBand", "memlock")
    limits[resource.RLIMIT_NOFILE] = (1024, 4096)
    assert is_(machine.check_limits(tmp_path), Status.WARN, "open files 4096", "ulimit -n")


def test_stale_build_locks_are_told_from_live_ones(tmp_path: Path) -> None:
    chosen, lock = tmp_path / "chosen", tmp_path / "chosen" / "cpu_adam" / "lock"
    assert is_(machine.check_build_locks([chosen]), Status.OK, "no build lock")
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert is_(machine.check_build_locks([chosen]), Status.OK, "1 builds under way")  # young
    hours_ago = time.time() - 7200
    os.utime(lock, (hours_ago, hours_ago))
    with lock.open():  # as PyTorch keeps it open while it builds
        assert is_(machine.check_build_locks([chosen]), Status.OK, "under way")
    assert is_(machine.check_build_locks([chosen]), Status.WARN, "2 h 00 min old", f"rm {lock}")
    assert is_(machine.check_build_locks([chosen], named=str(chosen)), Status.FAIL, "hangs")
    assert lock.exists()


def test_where_extensions_are_built() -> None:
    folders = machine.build_folders({"XDG_CACHE_HOME": "/cache", "TORCH_EXTENSIONS_DIR": "/mine"})
    assert folders[:3] == [Path("/mine"), Path("/cache/torch_extensions"), Path("/cache/autotune/torch_extensions")]


# Services


def no_question(*_: object, **__: object) -> dict[str, Any]:
    raise AssertionError("nothing is to be asked")


def test_ray_is_asked_only_where_an_address_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert is_(services.check_ray(None, no_question, {}), Status.OK, "starts Ray here")
    assert is_(services.check_ray("127.0.0.1:1", no_question, {}), Status.FAIL, "cannot be reached")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        there = {"RAY_ADDRESS": address, "RAY_AUTH_TOKEN": "secret-token"}
        finding = services.check_ray(None, no_question, there)
        assert is_(finding, Status.OK, address, "token of RAY_AUTH_TOKEN")
        assert "secret-token" not in finding.found
        nodes = {"nodes": [{"GPU": 8.0, "CPU": 64.0}, {"GPU": 8.0, "CPU": 64.0}]}
        finding = services.check_ray(address, lambda *_, **__: nodes, {})
        assert is_(finding, Status.OK, "without a token", "nodes 2, GPUs 16, CPUs 128")
        refused = {"error": "Ray cannot be used (wrong token); check"}
        assert is_(services.check_ray(address, lambda *_, **__: refused, {}), Status.FAIL, "wrong token")


def test_the_store_is_examined_and_neither_made_nor_changed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, path = f"sqlite:///{here}/a.db", here / "a.db"
    assert is_(services.check_store(url), Status.OK, "begins it")
    assert not path.exists()
    open_store(url, create=True).close()
    before = path.read_bytes()
    assert is_(services.check_store(url), Status.OK, "schema 0")
    with monkeypatch.context() as patch:
        patch.setattr("autotune.store.connect.journal_mode", lambda _: "delete")
        assert is_(services.check_store(f"sqlite:///{here}/b.db"), Status.WARN, "network file system", "postgresql")
    for revision, status, words in (("0001", Status.WARN, "earlier"), ("9999", Status.FAIL, "later version")):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("UPDATE autotune_schema SET version_num = ?", (revision,))
            connection.commit()
        assert is_(services.check_store(url), status, words)
    assert len(path.read_bytes()) == len(before)
    assert not (here / "b.db").exists()


def test_stores_that_cannot_be_used(here: Path) -> None:
    (here / "text.db").write_text("no database" * 100)
    with contextlib.closing(sqlite3.connect(here / "other.db")) as connection:
        connection.execute("CREATE TABLE t (a)")
    for url, words in (
        ("nonsense", "is no database URL"),
        (f"sqlite:///{here}/text.db", "not a database"),
        (f"sqlite:///{here}", "in the way"),
        (f"sqlite:///{here}/file/a.db", "in the way"),
        ("postgresql://user:secret@127.0.0.1:1/db", "refused"),
    ):
        finding = services.check_store(url)
        assert is_(finding, Status.FAIL, words)
        assert "secret" not in finding.found
    assert is_(services.check_store(f"sqlite:///{here}/other.db"), Status.WARN, "nothing of Autotune's")


def test_a_write_ahead_log_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE a (b)")
    monkeypatch.setattr("autotune.store.connect.journal_mode", lambda path: "delete")
    assert is_(services.check_store(f"sqlite:///{path}"), Status.FAIL, "WAL", "journal_mode=DELETE", "postgresql://")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    assert is_(services.check_store(f"sqlite:///{path}"), Status.WARN, "nothing of Autotune's")


# The command


def test_the_command_on_this_machine(tmp_path: Path) -> None:
    here, scratch = tmp_path / "here", tmp_path / "t"
    here.mkdir()
    scratch.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "autotune", "doctor", "--json"]
    environment["PYTHONPATH"] = str(ROOT)
    mark = {"AUTOTUNE_TEST": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment | mark, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    document = json.loads(run.stdout.splitlines()[-1])
    assert document["ok"]
    checks = {check["name"]: check for check in document["checks"]}
    assert list(checks)[:3] == ["python", "packages", "gpus"]
    for check in checks.values():
        assert set(check) == {"name", "status", "found", "remedy"}
        assert check["status"] in ("ok", "warn"), check
        assert (check["remedy"] is None) == (check["status"] == "ok")
    assert "a forked child found the libraries imported and CUDA untouched" in checks["ranks"]["found"]
    assert "can be built" in checks["deepspeed ops"]["found"]
    # Nothing is left behind: no file, and no process.
    assert list(here.iterdir()) == []
    assert list(scratch.iterdir()) == []
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("AUTOTUNE_TEST") == str(tmp_path):
                left.append(process)
    assert not left


def test_a_failing_check_is_exit_1_and_a_table_for_people(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "autotune", "doctor", "--quick", "--store", "nonsense"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "is no database URL" in run.stdout
    assert "→ write sqlite:///FILE.db" in run.stdout
    assert "ranks" not in run.stdout
