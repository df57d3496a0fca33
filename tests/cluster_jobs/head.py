"""A real Ray head that asks for a token, and a small study for it."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "search_spaces" / "tiny-cpu.yaml"
TOKEN = secrets.token_hex(32)
PATIENCE = 240.0


@dataclass
class Head:
    """A running cluster of one node."""

    address: str
    metrics_url: str
    folder: Path
    """Of Ray's sessions."""
    gcs: str = ""
    """HOST:PORT that nodes and drivers connect to."""

    def autotune(self, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "autotune", *arguments, "--address", self.address]
        variables = environment(token)
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, check=False)

    def document(self, *arguments: str) -> dict[str, Any]:
        """What `--json` printed."""
        run = self.autotune(*arguments, "--json")
        assert run.returncode == 0, run.stderr
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return found

    def metrics(self) -> list[str]:
        with urllib.request.urlopen(self.metrics_url, timeout=10) as page:
            return [line for line in page.read().decode().splitlines() if line.startswith("ray_autotune_")]


def environment(token: str) -> dict[str, str]:
    """Of a laptop and of the head: an address or a mode of the developer's own must not lead elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AUTOTUNE_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"RAY_AUTH_TOKEN": token, "PATH": path, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports: list[int] = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def wait_for_dashboard(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    while True:
        try:
            urllib.request.urlopen(request, timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


@contextlib.contextmanager
def running_head(**more: str) -> Iterator[Head]:
    """Start a head on free ports, with `more` in its environment, and end every process of it."""
    # Not pytest's folder: the paths of Ray's sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="at-"))
    gcs, dashboard, agent, metrics, client = free_ports(5)
    command = [
        "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2",
        "--num-gpus=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--include-dashboard=true",
        f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
        f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}",
        "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    variables = environment(TOKEN) | {"RAY_AUTH_MODE": "token"} | more
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=folder)
    started = psutil.Process(process.pid)
    head = Head(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", folder, f"127.0.0.1:{gcs}")
    try:
        wait_for_dashboard(head, process, folder / "head.log")
        yield head
    finally:
        family = [started]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += started.children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=15)
        shutil.rmtree(folder, ignore_errors=True)


def write_space(folder: Path, trials: int, study: str = "job-test") -> Path:
    document = yaml.safe_load(SPACE.read_text())
    # All trials: how soon none promises a gain any more depends on what a busy machine measures.
    document |= {"study": study, "budget": {"trials": trials, "trial_seconds": 120, "stop_below_gain": 0}}
    document["search"] = {"engine": "pytorch", "zero_stage": [0, 1, 2, 3], "precision": ["bf16", "fp32"]}
    document["search"] |= {"activation_checkpointing": ["none", "full"], "micro_batch_size": [1, 2, 4, 8, 16, 32]}
    document["baseline"] = {"precision": "fp32", "zero_stage": 0, "activation_checkpointing": "full"}
    document["baseline"] |= {"micro_batch_size": 8}
    document["measure"] |= {"confirm_top": 0}
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def until(condition: Callable[[], bool], complaint: object) -> None:
    """Wait; the complaint is shown as it is when patience ends."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.5)
