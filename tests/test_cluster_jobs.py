"""A study as a job of a real Ray cluster that asks for a token, from submitting to the best files.

One head and one study serve all tests that need a cluster: the study is submitted, watched, stopped when a trial is
finished and another runs, submitted again, and its files are fetched.
"""

import base64
import contextlib
import io
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from autotune.cluster_jobs.best_folder import MAX_BYTES, print_command, printed, unpack_best
from autotune.cluster_jobs.request import check_store, job_request, output_folder
from autotune.errors import ClusterError, StoreError, UsageError
from autotune.results import stored_counts
from autotune.store.store import open_store
from tests.samples import space_text

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "search_spaces" / "tiny-cpu.yaml"
TOKEN = secrets.token_hex(32)
PATIENCE = 240.0


@dataclass
class Head:
    """A running cluster of one node."""

    address: str
    metrics_url: str

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


@pytest.fixture(scope="module")
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
    head = Head(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics")
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


@dataclass
class Story:
    """What the whole affair left behind."""

    folder: Path
    first: dict[str, Any] = field(default_factory=dict)
    while_running: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)
    refused: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)
    stopped: dict[str, Any] = field(default_factory=dict)
    finished_when_stopped: set[str] = field(default_factory=set)
    second: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    at_the_end: dict[str, Any] = field(default_factory=dict)
    fetched: dict[str, Any] = field(default_factory=dict)
    impossible: dict[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder}/shared/a.db"

    def ended(self) -> Counter[str]:
        """How often each config came to an end that stands."""
        with open_store(self.store, create=False) as store:
            trials = store.trials("job-test")
        return Counter(t.fingerprint for t in trials for a in t.attempts if a.state in ("complete", "failed"))


def write_space(folder: Path, trials: int) -> Path:
    document = yaml.safe_load(SPACE.read_text())
    document |= {"study": "job-test", "budget": {"trials": trials, "trial_seconds": 120}}
    document["search"] = {"engine": "pytorch", "zero_stage": [0, 1, 2, 3], "precision": ["bf16", "fp32"]}
    document["search"] |= {"activation_checkpointing": ["none", "full"], "micro_batch_size": [1, 2, 4, 8, 16, 32]}
    document["baseline"] = {"precision": "fp32", "zero_stage": 0, "activation_checkpointing": "full"}
    document["baseline"] |= {"micro_batch_size": 8}
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def story(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Story:
    story = Story(tmp_path_factory.mktemp("jobs"))
    # More trials than there is time for: it must not end before it is stopped.
    submit = ["submit", str(write_space(story.folder, 100)), "--store", story.store]
    story.first = head.document(*submit)["job"]
    until(lambda: is_under_way(story), "no trial was finished while another one ran")
    story.while_running = head.document("status", "job-test")
    until(lambda: has_metrics(head, story), "no metrics of the running study")
    head.document("submit", str(ROOT / "search_spaces" / "qwen3-32b-sft-8xh100.yaml"), "--store", story.store)
    story.refused["wrong token"] = head.autotune("status", "job-test", token=secrets.token_hex(32))
    story.refused["again"] = head.autotune(*submit)
    story.refused["fetch"] = head.autotune("fetch", "job-test", "--out", str(story.folder / "too-early"))
    story.stopped = head.document("stop", "job-test")["job"]
    story.finished_when_stopped = set(story.ended())

    write_space(story.folder, len(story.finished_when_stopped) + 2)
    story.second = head.document(*submit)["job"]
    story.log = head.autotune("logs", "-f", "job-test").stdout
    story.at_the_end = head.document("status", "job-test")
    story.fetched = head.document("fetch", "job-test", "--out", str(story.folder / "laptop"))
    story.impossible = head.document("status", "qwen3-32b-sft-8xh100")
    return story


def until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.5)


def is_under_way(story: Story) -> bool:
    """Whether a trial is finished; read in this process, as a command a poll would slow the trials down."""
    try:
        with open_store(story.store, create=False) as store:
            return stored_counts(store.trials("job-test")).complete >= 1
    except StoreError:  # not created yet
        return False


def has_metrics(head: Head, story: Story) -> bool:
    story.metrics = head.metrics()
    return any(line.startswith("ray_autotune_best_tokens") for line in story.metrics)


pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
def test_a_job_is_named_after_its_study(story: Story) -> None:
    assert story.first["id"] == "autotune-job-test-1"
    assert story.second["id"] == "autotune-job-test-2"
    assert story.first["state"] in ("pending", "running")
    assert story.first["out"] == f"{story.folder}/shared/autotune-out/job-test"


@pytest.mark.slow
def test_status_shows_job_and_progress(story: Story) -> None:
    assert story.while_running["job"]["state"] == "running"
    assert story.while_running["job"]["driver_exit_code"] is None
    assert story.while_running["study"]["budget"] == {"trials": 100}
    assert story.while_running["study"]["best"]["tokens_per_second_per_gpu"] > 0
    assert story.at_the_end["job"]["id"] == "autotune-job-test-2"
    assert (story.at_the_end["job"]["state"], story.at_the_end["job"]["driver_exit_code"]) == ("succeeded", 0)
    trials = story.at_the_end["study"]["trials"]
    assert trials["complete"] + trials["out_of_memory"] == len(story.finished_when_stopped) + 2
    assert trials["running"] == trials["interrupted"] == trials["failed"] == 0


@pytest.mark.slow
def test_prometheus_sees_the_running_study(story: Story) -> None:
    for series in ("ray_autotune_trials{", 'state="complete"'), ("ray_autotune_gpu_seconds_total{", 'use="idle"'):
        found = [line for line in story.metrics if line.startswith(series[0]) and series[1] in line]
        assert len(found) == 1, story.metrics
        assert 'study="job-test"' in found[0]
        assert 'model="qwen3-tiny"' in found[0]
        assert float(found[0].split()[-1]) > 0


@pytest.mark.slow
def test_a_cluster_that_refuses_us_is_one_sentence(story: Story) -> None:
    assert story.refused["wrong token"].returncode == 5
    assert "refused our token" in error_of(story.refused["wrong token"])


@pytest.mark.slow
def test_a_running_study_is_not_submitted_twice(story: Story) -> None:
    assert story.refused["again"].returncode == 2
    assert "autotune-job-test-1" in error_of(story.refused["again"])


@pytest.mark.slow
def test_files_that_are_not_there_yet(story: Story) -> None:
    assert story.refused["fetch"].returncode == 2
    assert "autotune status job-test" in error_of(story.refused["fetch"])
    assert not (story.folder / "too-early").exists()


@pytest.mark.slow
def test_stop_and_submit_again_loses_and_repeats_nothing(story: Story) -> None:
    assert story.stopped["id"] == "autotune-job-test-1"
    assert story.stopped["state"] == "stopped"
    assert story.finished_when_stopped
    ended = story.ended()
    assert set(ended.values()) == {1}
    assert story.finished_when_stopped < set(ended)
    with open_store(story.store, create=False) as store:
        cut = [t for t in store.trials("job-test") if any(a.state == "interrupted" for a in t.attempts)]
    assert len(cut) == 1
    # Its reason is in the store: the driver had the time to write it before it was killed.
    assert any(a.outcome is not None and "was stopped" in a.outcome.message for a in cut[0].attempts)  # type: ignore[union-attr]


@pytest.mark.slow
def test_logs_are_followed_to_their_end(story: Story) -> None:
    total = len(story.finished_when_stopped) + 2
    assert f"resumed with {total - 2} finished trials" in story.log
    assert f"[{total}/{total}] trial" in story.log
    last = next(line for line in reversed(story.log.splitlines()) if line.startswith("{"))
    assert json.loads(last)["study"] == "job-test"
    assert TOKEN not in story.log


@pytest.mark.slow
def test_the_best_files_arrive_as_they_are(story: Story) -> None:
    original, here = Path(story.second["out"]) / "best", story.folder / "laptop" / "best"
    names = sorted(path.name for path in original.iterdir())
    assert "best.yaml" in names
    assert sorted(path.name for path in here.iterdir()) == sorted(story.fetched["artifacts"]) == names
    for name in names:
        assert (here / name).read_bytes() == (original / name).read_bytes()
        assert os.access(here / name, os.X_OK) == os.access(original / name, os.X_OK)


@pytest.mark.slow
def test_a_job_that_failed_says_why(story: Story) -> None:
    job = story.impossible["job"]
    assert (job["state"], job["driver_exit_code"]) == ("failed", 5)
    assert job["message"].startswith("error: ")
    assert "H100-80GB" in job["message"]
    assert story.impossible["study"] is None


@pytest.mark.slow
def test_an_unknown_study_names_those_that_are_there(head: Head, story: Story) -> None:
    run = head.autotune("stop", "other")
    assert run.returncode == 2
    assert "job-test" in error_of(run)


# Without a cluster


def error_of(run: subprocess.CompletedProcess[str]) -> str:
    """The one sentence on stderr."""
    assert run.stdout == ""
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_nobody_at_the_address(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text())
    nobody = Head(f"http://127.0.0.1:{free_ports(1)[0]}", "")
    run = nobody.autotune("submit", str(path), "--store", f"sqlite:///{tmp_path}/a.db")
    assert run.returncode == 5
    assert "--address" in error_of(run)


def test_an_address_that_is_no_dashboard() -> None:
    run = Head("ray://127.0.0.1:10001", "").autotune("status", "sample")
    assert run.returncode == 2
    assert "http://127.0.0.1:8265" in error_of(run)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:///autotune.db", "sqlite:////ABSOLUTE"),
        ("postgresql://tuner:hunter2@db/studies", "PGPASSFILE"),
        ("postgresql://tuner@db/studies?password=hunter2", "PGPASSFILE"),
        ("mysql://db/studies", "postgresql"),
    ],
)
def test_a_store_that_a_job_cannot_use(url: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as raised:
        check_store(url)
    assert "hunter2" not in str(raised.value)


def test_a_store_that_a_job_can_use() -> None:
    check_store("sqlite:////shared/a.db")
    check_store("postgresql://tuner@db/studies")


def test_what_is_submitted(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    config = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
    config |= {"max_position_embeddings": 128, "tie_word_embeddings": True}
    (tmp_path / "models" / "mine" / "config.json").write_text(json.dumps(config))
    (tmp_path / "models" / "mine" / "model.safetensors").write_text("large")
    path = tmp_path / "my space.yaml"
    path.write_text(space_text(model="models/mine"))
    request = job_request(path, store="postgresql://tuner@db/studies", out=Path("/results"), sampler="random")
    assert shlex.split(request.entrypoint) == [
        "python", "-m", "autotune", "tune", "my space.yaml", "--store", "postgresql://tuner@db/studies",
        "--out", "/results", "--address", "auto", "--json", "--sampler", "random",
    ]  # fmt: skip
    assert (request.metadata["study"], request.metadata["model"]) == ("sample", "models/mine")
    sent = tmp_path / "sent"
    sent.mkdir()
    request.gather(sent)
    files = sorted(str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file())
    assert files == ["models/mine/config.json", "my space.yaml"]


def test_where_the_files_go() -> None:
    assert output_folder(None, "sqlite:////shared/a.db", "x") == "/shared/autotune-out/x"
    assert output_folder(Path("/results"), "postgresql://db/studies", "x") == "/results"
    with pytest.raises(UsageError, match="--out is missing"):
        output_folder(None, "postgresql://db/studies", "x")
    with pytest.raises(UsageError, match="absolute"):
        output_folder(Path("results"), "sqlite:////shared/a.db", "x")


def pack(*members: tuple[str, bytes] | tarfile.TarInfo) -> str:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return base64.b64encode(packed.getvalue()).decode()


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


GOOD = ("best/best.yaml", b"a: 1\n")


@pytest.mark.parametrize(
    "packed",
    [
        pack(GOOD, ("best/../../outside", b"x")),
        pack(GOOD, ("/outside", b"x")),
        pack(GOOD, ("outside", b"x")),
        pack(GOOD, ("best/..", b"x")),
        pack(GOOD, ("best/a/b", b"x")),
        pack(GOOD, link("best/passwd", "/etc/passwd")),
        pack(GOOD, ("best/large", b"0" * (MAX_BYTES + 1))),
        pack(GOOD)[:60],
        pack(GOOD) + "!",
        "",
    ],
)
def test_a_folder_that_is_refused_changes_nothing(tmp_path: Path, packed: str) -> None:
    out = tmp_path / "out"
    unpack_best(pack(("best/old.yaml", b"old")), "there", out)
    with pytest.raises(ClusterError, match="there"):
        unpack_best(packed, "there", out)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path("out/best/old.yaml")]


def test_a_folder_is_printed_among_other_lines(tmp_path: Path) -> None:
    source = tmp_path / "it's here"
    (source / "best").mkdir(parents=True)
    (source / "best" / "launch.sh").write_bytes(os.urandom(5000))
    (source / "best" / "launch.sh").chmod(0o755)
    command = print_command(str(source))
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    packed = printed(f"Running entrypoint: {command}\n{run.stdout}The supervisor has ended\n")
    assert packed is not None
    [arrived] = unpack_best(packed, "there", tmp_path / "out")
    assert arrived.read_bytes() == (source / "best" / "launch.sh").read_bytes()
    assert os.access(arrived, os.X_OK)
    missing = subprocess.run(["sh", "-c", print_command(str(tmp_path / "none"))], capture_output=True, text=True)
    assert missing.returncode != 0
    assert printed(missing.stdout) is None


def test_a_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    unpack_best(pack(("best/old.yaml", b"old")), "there", tmp_path)
    assert unpack_best(pack(GOOD), "there", tmp_path) == [tmp_path / "best" / "best.yaml"]
    assert [path.name for path in tmp_path.rglob("*")] == ["best", "best.yaml"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        unpack_best(pack(GOOD), "there", tmp_path / "file")
