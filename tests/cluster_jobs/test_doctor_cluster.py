"""`autotune doctor --cluster`: its judgement on nodes made up, and a real cluster of two nodes on this machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.doctor.check import Check, Status
from autotune.doctor.cluster import check_all_reduce, check_cluster, check_nodes, check_storage, check_versions
from tests.cluster_jobs.head import TOKEN, Head, environment, until

H100 = "NVIDIA H100 80GB HBM3"


def node(address: str, count: int = 8, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "host": "n",
        "address": address,
        "versions": {"python": "3.12.3", "ray": "2.60.0", "torch": "2.13.0"},
        "gpus": [H100] * count,
        "ray_gpus": count,
        "total_bytes": 85_000_000_000,
        "checks": [],
        "storage": None,
        "seen": 2,
    }
    return found | changes


TWO = [node("10.0.0.1"), node("10.0.0.2")]


def test_nodes_that_are_alike() -> None:
    assert check_nodes(TWO).found == f"2 nodes, 8 x {H100} each"
    assert check_nodes([node("a", count=0)]).found == "1 node, no GPUs"
    assert check_versions(TWO).status is check_storage(TWO, "/shared").status is Status.OK


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"error": "ModuleNotFoundError: No module named 'autotune'"}, Status.FAIL, "10.0.0.2 (ModuleNotFoundError"),
        ({"ray_gpus": 4}, Status.WARN, "10.0.0.2 (4 of 8)"),
        ({"gpus": ["NVIDIA A100-SXM4-80GB"] * 8}, Status.WARN, "differ"),
    ],
)
def test_a_node_that_is_not(changes: dict[str, Any], status: Status, words: str) -> None:
    finding = check_nodes([TWO[0], node("10.0.0.2", **changes)])
    assert finding.status is status
    assert words in finding.found
    assert finding.remedy


def test_versions_that_differ() -> None:
    other = node("10.0.0.3", versions={"python": "3.12.3", "ray": "2.60.0", "torch": "2.12.0"})
    finding = check_versions([*TWO, other])
    assert finding.status is Status.FAIL
    assert finding.found == "torch 2.13.0, but 2.12.0 on 10.0.0.3"


def test_storage_that_is_not_shared_or_not_writable() -> None:
    finding = check_storage([TWO[0], node("10.0.0.2", seen=1)], "/shared")
    assert finding.status is Status.WARN
    assert "10.0.0.2" in finding.found
    finding = check_storage([TWO[0], node("10.0.0.2", storage="Permission denied")], "/shared")
    assert finding.status is Status.FAIL
    assert "10.0.0.2 (Permission denied)" in finding.found


def reduced(seconds: float, nodes: list[dict[str, Any]], ranks: int) -> dict[str, Any]:
    result = {"bytes": 256 * 1024**2, "seconds": seconds}
    return {"nodes": nodes, "device": "cuda", "ranks": ranks, "all_reduce": result}


def test_a_network_as_fast_as_its_cards() -> None:
    # 8 cards of 50 GB/s a node: half of 2 x 256 MiB goes over each node's cards, at about two thirds of 400 GB/s.
    finding = check_all_reduce(reduced(1.3e-3, TWO, 16))
    assert finding.status is Status.OK, finding.found
    assert "bus bandwidth 387 GB/s" in finding.found


def test_a_network_that_goes_over_sockets() -> None:
    finding = check_all_reduce(reduced(0.2, TWO, 16))
    assert finding.status is Status.WARN
    assert "NET/Socket" in str(finding.remedy)
    finding = check_all_reduce(reduced(0.2, TWO[:1], 8))
    assert finding.status is Status.WARN
    assert "nvlink" in str(finding.remedy)


def test_ranks_that_do_not_meet_and_hardware_that_is_not_known() -> None:
    failed = reduced(1.0, TWO, 16) | {"all_reduce": {"error": "no answer in time"}}
    assert check_all_reduce(failed).status is Status.FAIL
    assert "NCCL_SOCKET_IFNAME" in str(check_all_reduce(failed).remedy)
    unknown = [node("a") | {"gpus": ["GPU of tomorrow"] * 8}]
    assert "does not know" in check_all_reduce(reduced(1.0, unknown, 8)).found
    assert check_all_reduce({"nodes": TWO[:1], "device": "cuda", "ranks": 1}).status is Status.OK


def test_a_cluster_that_is_silent_is_one_finding() -> None:
    def nobody() -> dict[str, Any]:
        raise RuntimeError("no answer within 500 s")

    for ask in (nobody, lambda: {"error": "no answer within 500 s"}):
        [check] = check_cluster(ask, "/shared")
        assert (check.name, check.status, check.found) == ("nodes", Status.FAIL, "no answer within 500 s")
        assert check.remedy


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_real_nodes(head: Head, tmp_path: Path) -> None:
    variables = environment(TOKEN) | {"RAY_AUTH_MODE": "token"}
    join = ["ray", "start", f"--address={head.gcs}", "--block", "--num-cpus=1", "--num-gpus=0", "--disable-usage-stats"]
    join += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    join += ["--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
    with (tmp_path / "log").open("wb") as log:
        second = subprocess.Popen(join, stdout=log, stderr=log, env=variables)
    command = [sys.executable, "-m", "autotune", "doctor", "--cluster", "--address", head.gcs, "--json"]
    command += ["--out", str(tmp_path / "shared")]

    def checks() -> list[Check]:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, check=False)
        document = json.loads(run.stdout.splitlines()[-1])
        assert run.returncode == (0 if document["ok"] else 1), run.stderr
        return [Check(**{**check, "status": Status(check["status"])}) for check in document["checks"]]

    found: dict[str, Check] = {}

    def both() -> bool:
        found.update({check.name: check for check in checks()})
        return found["nodes"].found.startswith("2 nodes")

    try:
        until(both, "the second node did not join")
    finally:
        second.terminate()
        second.wait(60)
    assert found["nodes"].status is Status.OK
    assert found["versions"].status is Status.OK
    assert "ray 2." in found["versions"].found
    assert found["shared storage"].status is Status.OK, found["shared storage"].found
    assert "2 nodes, and is one folder" in found["shared storage"].found
    assert found["all-reduce"].status is Status.OK, found["all-reduce"].found
    assert found["all-reduce"].found.startswith("2 ranks on 2 nodes: 16.0 MiB in ")
    assert {"gpus", "limits", "shared memory"} <= {name.partition(": ")[2] for name in found}
    assert list((tmp_path / "shared").iterdir()) == []  # nothing is left behind
