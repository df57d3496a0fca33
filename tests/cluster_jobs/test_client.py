"""A study as a job of a real Ray cluster that asks for a token, from submitting to the best files.

One study serves all tests: it is submitted, watched, stopped when a trial is finished and another runs, submitted
again, and its files are fetched.
"""

import json
import os
import secrets
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import StoreError
from autotune.results import stored_counts
from autotune.store.store import open_store
from tests.cluster_jobs.head import ROOT, TOKEN, Head, free_ports, until, write_space
from tests.samples import space_text


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
    elsewhere = [
        "submit",
        str(story.folder / "other" / "space.yaml"),
        "--store",
        f"sqlite:///{story.folder}/space.yaml/a.db",
    ]
    (story.folder / "other").mkdir()
    write_space(story.folder / "other", 1, "other-test")
    story.refused["store"] = head.autotune(*elsewhere)
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


def is_under_way(story: Story) -> bool:
    """Whether a trial is finished; read in this process, as a command a poll would slow the trials down."""
    try:
        with open_store(story.store, create=False) as store:
            return stored_counts(store.trials("job-test")).complete >= 1
    except StoreError:  # not created yet
        return False


def has_metrics(head: Head, story: Story) -> bool:
    # Those of another study may still be shown.
    story.metrics = [line for line in head.metrics() if 'study="job-test"' in line]
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
    assert (
        trials["complete"] + trials["out_of_memory"] + trials["stopped_early"] == len(story.finished_when_stopped) + 2
    )
    assert trials["running"] == trials["interrupted"] == trials["failed"] == 0


@pytest.mark.slow
def test_prometheus_sees_the_running_study(story: Story) -> None:
    for series in ("ray_autotune_trials{", 'state="complete"'), ("ray_autotune_gpu_seconds_total{", 'use="idle"'):
        found = [line for line in story.metrics if line.startswith(series[0]) and series[1] in line]
        assert len(found) == 1, story.metrics
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
def test_a_store_that_the_head_cannot_use_is_refused_before_anything_starts(head: Head, story: Story) -> None:
    assert story.refused["store"].returncode == 2
    error = error_of(story.refused["store"])
    assert "space.yaml is in the way" in error
    assert "--store" in error
    assert "job-test" in error_of(head.autotune("status", "other-test"))  # no such job


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
    nobody = Head(f"http://127.0.0.1:{free_ports(1)[0]}", "", tmp_path)
    run = nobody.autotune("submit", str(path), "--store", f"sqlite:///{tmp_path}/a.db")
    assert run.returncode == 5
    assert "--address" in error_of(run)


def test_an_address_that_is_no_dashboard(tmp_path: Path) -> None:
    run = Head("ray://127.0.0.1:10001", "", tmp_path).autotune("status", "sample")
    assert run.returncode == 2
    assert "http://127.0.0.1:8265" in error_of(run)
