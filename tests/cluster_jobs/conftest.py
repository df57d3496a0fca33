"""One head serves all tests of this folder that need a cluster."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster_jobs.head import TOKEN, Head, environment, free_ports, wait_for_dashboard


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
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
    variables = environment(TOKEN) | {"RAY_AUTH_MODE": "token"}
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=folder)
    head = Head(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", folder, f"127.0.0.1:{gcs}")
    try:
        wait_for_dashboard(head, process, folder / "head.log")
        yield head
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=15)
        shutil.rmtree(folder, ignore_errors=True)
