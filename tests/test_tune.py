"""The main job for real: one command on this machine, stopped politely, killed, and finished.

One run of most of the demo space serves all tests of this file: it is killed with SIGKILL after five finished trials,
terminated while the winner is confirmed, and then left to end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from autotune.errors import StoreError
from autotune.formats.deepspeed_json import check_deepspeed
from autotune.results import stored_counts
from autotune.spec.record import AttemptState
from autotune.store.store import open_store

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "search_spaces" / "tiny-cpu.yaml"
TRIALS = 12
RUNS = 6
"""That confirm: two of the baseline and of two finalists."""
SEARCH = yaml.safe_load(SPACE.read_text())["search"]
BASELINE = {"engine": "deepspeed", "zero_stage": 3, "micro_batch_size": 8, "activation_checkpointing": "full"}
BUDGET = {"trials": TRIALS, "trial_seconds": 60}
CHANGES = {"search": SEARCH | {"precision": "fp32"}, "baseline": BASELINE, "budget": BUDGET}
"""Products in bf16 are slow on many processors, whole steps of the demo's baseline on all; they add nothing here."""
AUTOTUNE = [sys.executable, "-m", "autotune"]
CPU_ONLY_KEYS = ("torch_adam", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer", "use_cpu", "no_cuda")


@dataclass
class Run:
    """What the whole affair left behind."""

    folder: Path
    store: str
    stopped_code: int
    confirmed_when_stopped: int
    finished_when_killed: int
    orphans: list[str]
    final: subprocess.CompletedProcess[str]

    @property
    def result(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.final.stdout.splitlines()[-1])
        return document


def autotune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*AUTOTUNE, *arguments], capture_output=True, text=True, timeout=280, cwd=ROOT, check=False)


def tune_arguments(folder: Path) -> list[str]:
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump(yaml.safe_load(SPACE.read_text()) | CHANGES))
    return ["tune", str(space), "--store", f"sqlite:///{folder}/x/a.db", "--out", f"{folder}/x/out", "--json"]


def trials(store: str) -> list[dict[str, Any]]:
    shown = autotune("show", "tiny-cpu", "--store", store, "--json")
    listed: list[dict[str, Any]] = json.loads(shown.stdout.splitlines()[-1])["trials"] if shown.returncode == 0 else []
    return listed


def progress(store: str) -> tuple[int, int, bool]:
    """Finished trials, finished runs that confirm, and whether something runs; read in this process: a command a poll
    would slow the trials down.
    """
    try:
        with open_store(store, create=False) as opened:
            records = opened.trials("tiny-cpu")
    except StoreError:  # not created yet
        return 0, 0, False
    attempts = [attempt for record in records for attempt in record.attempts]
    confirmed = sum(a.turn is not None and a.state is AttemptState.COMPLETE for a in attempts)
    return stored_counts(records).finished, confirmed, any(a.state is AttemptState.RUNNING for a in attempts)


def until(folder: Path, store: str, trials: int, confirmed: int = 0) -> subprocess.Popen[bytes]:
    """Start the study and return when so much is finished and something runs."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([*AUTOTUNE, *tune_arguments(folder)], stdout=log, stderr=log, cwd=ROOT)
    deadline = time.monotonic() + 240
    while True:
        done, runs, running = progress(store)
        if done >= trials and runs >= confirmed and running:
            return process
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tune")
    store = f"sqlite:///{folder}/x/a.db"
    process = until(folder, store, 5)
    family = psutil.Process(process.pid).children(recursive=True)
    at_once = [child for child in family if not child.name().startswith("ray::")]
    process.kill()
    process.wait()
    finished_when_killed = progress(store)[0]
    # Workers and trials must be gone at once. Ray's agents poll for the end of their raylet and take half a minute; by
    # the end of the last run they must be gone too.
    _, alive = psutil.wait_procs(at_once, timeout=30)
    orphans = [f"{p.pid} {p.name()}" for p in alive]

    process = until(folder, store, TRIALS, confirmed=1)
    process.send_signal(signal.SIGTERM)
    stopped_code = process.wait(timeout=60)
    confirmed_when_stopped = progress(store)[1]

    final = autotune(*tune_arguments(folder))
    _, alive = psutil.wait_procs(family, timeout=60)
    orphans += [f"{p.pid} {p.name()}" for p in alive]
    return Run(folder, store, stopped_code, confirmed_when_stopped, finished_when_killed, orphans, final)


@pytest.mark.timeout(600)
def test_the_last_line_is_the_result(run: Run) -> None:
    assert run.final.returncode == 0, run.final.stderr
    assert set(run.result) == {
        "study", "trials", "stop_reason", "gpu_seconds", "best", "baseline", "confirmation", "prediction", "artifacts",
        "advice", "sensitivity", "pareto",
    }  # fmt: skip
    assert run.result["study"] == "tiny-cpu"
    counts = run.result["trials"]
    assert counts["complete"] + counts["stopped_early"] == TRIALS
    assert counts["complete"] >= 3
    assert run.result["stop_reason"] == f"{TRIALS} trials"
    assert run.result["gpu_seconds"]["confirming"] > 0
    assert run.result["gpu_seconds"]["out_of_memory"] == 0
    # About a third of the candidates do not fit, and none of those was launched.
    assert run.result["trials"]["out_of_memory"] == 0
    assert run.result["prediction"]["measured"] == run.result["trials"]["complete"]
    assert run.result["prediction"]["largest_error"] < 0.03
    assert run.result["prediction"]["surprises"] == []
    assert run.result["trials"]["failed"] == 0
    assert run.result["best"]["measurement"]["tokens_per_second_per_gpu"] > 0
    assert len(run.result["best"]["measurement"]["ranks"]) == 2 * 2  # in both rounds


def test_stopping_is_no_failure_and_leaves_nothing_running(run: Run) -> None:
    assert run.stopped_code == 130
    assert 1 <= run.confirmed_when_stopped < RUNS
    assert run.finished_when_killed >= 5
    assert run.orphans == []


def test_no_trial_is_lost_or_repeated(run: Run) -> None:
    listed = trials(run.store)
    assert len(listed) == sum(run.result["trials"].values()) == TRIALS
    screened = [(t, a) for t in listed for a in t["attempts"] if a["confirmation"] is None]
    ended = Counter(t["fingerprint"] for t, a in screened if a["state"] in ("complete", "failed"))
    assert len(ended) == TRIALS
    assert set(ended.values()) == {1}
    cut = [trial for trial in listed if any(attempt["state"] == "interrupted" for attempt in trial["attempts"])]
    assert 1 <= len(cut) <= 2  # one at SIGKILL, one at SIGTERM, which may have hit the same trial
    for trial in cut:
        assert trial["attempts"][-1]["state"] in ("complete", "failed")
        assert trial["outcome"] is not None


def test_the_winner_is_confirmed_in_turns_also_across_a_stop(run: Run) -> None:
    confirmation = run.result["confirmation"]
    assert confirmation["number"] == 1
    assert confirmation["winner"] == run.result["best"]["trial"]
    contenders = [contender["trial"] for contender in confirmation["contenders"]]
    assert (len(contenders), contenders[0]) == (3, 1)
    runs = [
        (a["started_at"], t["trial"], a["confirmation"]["round"])
        for t in trials(run.store)
        for a in t["attempts"]
        if a["confirmation"] is not None and a["state"] == "complete"
    ]
    assert [trial for _, trial, _ in sorted(runs)] == contenders * 2
    assert [number for _, _, number in sorted(runs)] == [1, 1, 1, 2, 2, 2]
    gain = confirmation["gain"]
    assert gain is None or gain["low"] < gain["estimate"] < gain["high"]
    for rank in run.result["best"]["measurement"]["ranks"]:
        assert len(rank["long_run"]["step_seconds"]) == 2
    assert confirmation["contenders"][0]["checkpoint_bytes"] > 0
    assert not list(run.folder.rglob("checkpoint"))
    provenance = json.loads(Path(run.result["artifacts"]["provenance.json"]).read_text())
    assert provenance["method"]["confirmed"]


def test_show_lists_config_outcome_and_timings(run: Run) -> None:
    for trial in trials(run.store):
        assert trial["config"]["micro_batch_size"] >= 1
        assert trial["outcome"].get("kind", "stopped_early") == "stopped_early"
        assert trial["outcome"]["elapsed_seconds"] > 0
        assert all(attempt["started_at"] for attempt in trial["attempts"])
        assert set(trial["outcome"]["phase_seconds"]) == {"start", "build", "warmup", "measure"}
        assert trial["prediction"]["device_used_bytes"] > 0


def test_the_best_files_are_what_was_measured(run: Run) -> None:
    artifacts = run.result["artifacts"]
    ours, theirs = {"best.yaml", "launch.sh", "provenance.json", "README.md"}, {"ds_config.json", "ds_config.hf.json"}
    assert set(artifacts) == ours | theirs | {"training_args.yaml", "accelerate.yaml"}
    assert not any(key in Path(artifacts[name]).read_text() for name in theirs for key in CPU_ONLY_KEYS)
    document = json.loads(Path(artifacts["ds_config.json"]).read_text())
    check_deepspeed(document)  # DeepSpeed's own parser
    provenance = json.loads(Path(artifacts["provenance.json"]).read_text())
    source = trials(run.store)[provenance["files"]["ds_config.json"]["trial"] - 1]
    assert source["config"]["engine"] == "deepspeed"
    assert source["outcome"]["outcome"] == "measurement"
    assert document["train_micro_batch_size_per_gpu"] == source["config"]["micro_batch_size"]
    assert document["zero_optimization"]["stage"] == source["config"]["zero_stage"]
    assert provenance["files"]["best.yaml"]["trial"] == run.result["best"]["trial"]
    assert os.access(artifacts["launch.sh"], os.X_OK)


def test_the_reading_verbs_agree(run: Run) -> None:
    best = json.loads(autotune("best", "tiny-cpu", "--store", run.store, "--json").stdout)
    assert best["best"] == run.result["best"]
    studies = json.loads(autotune("studies", "--store", run.store, "--json").stdout)["studies"]
    assert [(study["study"], study["trials"]) for study in studies] == [("tiny-cpu", run.result["trials"])]
    one = autotune("show", "tiny-cpu", "1", "--store", run.store)
    assert '"source": "baseline"' in one.stdout


def test_a_finished_study_is_not_run_again(run: Run) -> None:
    again = autotune(*tune_arguments(run.folder))
    assert again.returncode == 0
    assert json.loads(again.stdout.splitlines()[-1]) == run.result
    assert len(trials(run.store)) == TRIALS
