"""`cluster/monitoring`: the files as Prometheus' own tool reads them, and the dashboard's queries on a live study."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from autotune import metrics
from tests.cluster_jobs.head import ROOT, Head, free_ports, running_head, until, write_space

MONITORING = ROOT / "cluster" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {panel["title"]: target["expr"] for panel in PANELS for target in panel["targets"]}
UTILIZATION = {"0": 37, "1": 91}
"""Percent, by index of a device that the fake driver has."""
MEMORY_USED = {"0": 3 << 30, "1": (70 << 30) + (1 << 20)}
"""Bytes, likewise."""


def need(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed (Debian's package `prometheus` has it)")
    return path


@pytest.mark.parametrize(
    "command",
    [["check", "rules", "rules.yml"], ["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]],
)
def test_prometheus_own_tool(command: list[str]) -> None:
    run = subprocess.run([need("promtool"), *command], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_operator_gets_the_same_rules() -> None:
    custom = yaml.safe_load((ROOT / "k8s" / "components" / "monitoring" / "rules.yaml").read_text())
    assert custom["spec"] == yaml.safe_load((MONITORING / "rules.yml").read_text())


def test_the_dashboard_reads_what_is_published() -> None:
    rules = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"][0]["rules"]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    known = (
        {f"ray_{name}" for name in METRICS_GAUGES}
        | recorded
        | set(re.findall(r"ray_autotune_\w+", metrics.__doc__ or ""))
    )
    for title, query in [*QUERIES.items(), *((str(rule), rule["expr"]) for rule in rules)]:
        named = set(re.findall(r"\b(?:ray_|autotune:)[\w:]+", query))
        assert named, title
        assert named <= known, title
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}


class Prometheus:
    """A running server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Samples of an instant query, as a panel's newest point. Other tests' studies may still be shown there."""
        query = query.replace("$study", "watched")
        with urllib.request.urlopen(f"{self.address}/api/v1/query?{urllib.parse.urlencode({'query': query})}") as page:
            result: list[dict[str, Any]] = json.load(page)["data"]["result"]
        return result

    def answers(self, query: str) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.ask(query))
        return False

    def by_gpu(self, query: str, cluster: Head) -> dict[str, float]:
        """By index; only this cluster's, as the machine of a developer may have GPUs and a driver of its own."""
        port = urllib.parse.urlsplit(cluster.metrics_url).port
        samples = [sample for sample in self.ask(query) if sample["metric"]["instance"].endswith(f":{port}")]
        return {sample["metric"]["GpuIndex"]: float(sample["value"][1]) for sample in samples}


@pytest.fixture(scope="module")
def gpu_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A second cluster, whose driver is `nvml.c`: no trial, no other test may see its devices."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("cc is not installed: no C compiler for the fake NVIDIA driver, and so no data for the GPU panels")
    folder = tmp_path_factory.mktemp("nvml")
    values = [f"-DUTILIZATION={','.join(map(str, UTILIZATION.values()))}"]
    values += [f"-DUSED={','.join(f'{used}ULL' for used in MEMORY_USED.values())}"]
    library = ["-o", str(folder / "libnvidia-ml.so.1"), str(Path(__file__).with_name("nvml.c"))]
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", *values, *library], check=True)
    libraries = filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])
    with running_head(LD_LIBRARY_PATH=os.pathsep.join(libraries)) as head:
        yield head


@pytest.fixture(scope="module")
def prometheus(head: Head, gpu_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With our files, but for the folders of Ray's sessions and an interval for the hurried."""
    binary, folder, [port] = need("prometheus"), tmp_path_factory.mktemp("prometheus"), free_ports(1)
    text = (MONITORING / "prometheus.yml").read_text()
    [listed] = re.findall(r"files: \[(/tmp/ray/[^],]+)\]", text)
    both = ", ".join(listed.replace("/tmp/ray", str(cluster.folder)) for cluster in (head, gpu_head))
    (folder / "prometheus.yml").write_text(text.replace(f"[{listed}]", f"[{both}]").replace("10s", "1s"))
    shutil.copy(MONITORING / "rules.yml", folder)
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [binary, *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log, cwd=folder
        )
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_panel_shows_a_live_study(head: Head, gpu_head: Head, prometheus: Prometheus, tmp_path: Path) -> None:
    """Every query of the dashboard has an answer, none excepted.

    Fake: the NVIDIA driver of the second cluster, `nvml.c` in the place of `libnvidia-ml.so.1`, so its two devices and
    what they say. Real: everything behind it, which is Ray's pynvml, its reporter agent and metrics endpoint,
    Prometheus with our files, the dashboard's queries; and the study, which runs on the first cluster, without GPUs.
    """
    submit = ["submit", str(write_space(tmp_path, 100, "watched")), "--store", f"sqlite:///{tmp_path}/a.db"]
    head.document(*submit)
    try:
        missing = dict(QUERIES)

        def complete() -> bool:
            for title in [title for title, query in missing.items() if prometheus.answers(query)]:
                del missing[title]
            return not missing

        until(complete, missing)
        [trials] = prometheus.ask('ray_autotune_trials{study="watched", state="complete"}')
        assert trials["metric"]["model"] == "qwen3-tiny"
        assert float(trials["value"][1]) >= 1
        used = {s["metric"]["use"]: float(s["value"][1]) for s in prometheus.ask(QUERIES["Share of GPU time by use"])}
        assert sum(used.values()) == pytest.approx(1)
        gpus = {s["metric"]["state"]: float(s["value"][1]) for s in prometheus.ask(QUERIES["GPUs by state"])}
        assert sum(gpus.values()) == 2
        [error] = prometheus.ask(
            'ray_autotune_prediction_error_ratio{study="watched", quantity="memory", statistic="largest"}'
        )
        assert 0 <= float(error["value"][1]) < 0.1
        assert prometheus.by_gpu(QUERIES["GPU utilization"], gpu_head) == UTILIZATION
        assert prometheus.by_gpu(QUERIES["GPU memory used"], gpu_head) == MEMORY_USED
        with urllib.request.urlopen(f"{prometheus.address}/api/v1/rules") as page:
            rules = [rule for group in json.load(page)["data"]["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}
    finally:
        head.document("stop", "watched")
