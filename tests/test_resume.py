"""Several trials at a time, a second driver, and a driver that is killed again and again: the end is the same."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from autotune.errors import StoreError
from autotune.results import attempted_outcomes, standing_outcome, stored_counts
from autotune.spec.outcome import Measurement
from autotune.spec.record import AttemptState, TrialRecord
from autotune.store.store import open_store
from tests.samples import space_text

ROOT = Path(__file__).parents[1]
KILLS = 10
# Every candidate fits, and none is stopped early where a slow one may need least memory: two runs find the same out.
SPACE = space_text(
    cluster={"nodes": 1, "gpus_per_node": 2, "gpu": "cpu", "memory_bytes": "64MiB"},
    workload={"global_batch_size": 64, "sequence_length": 128},
    search={
        "engine": "pytorch",
        "gpus": [1, 2],
        "precision": "fp32",
        "zero_stage": [0, 3],
        "activation_checkpointing": "none",
        "micro_batch_size": [1, 2, 4],
    },
    baseline=...,
    objective={"minimize": "peak_device_used_bytes"},
    budget={"trials": 100, "trial_seconds": 60},
)


class Tuned:
    """A study of all candidates in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = f"sqlite:///{folder}/a.db"
        (folder / "space.yaml").write_text(SPACE)

    def start(self) -> subprocess.Popen[bytes]:
        arguments = ["tune", str(self.folder / "space.yaml"), "--store", self.store, "--out", str(self.folder / "out")]
        command = [sys.executable, "-m", "autotune", *arguments, "--json"]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, preexec_fn=_take_interrupts)

    def end(self) -> dict[str, Any]:
        process = self.start()
        assert process.wait(timeout=250) == 0, self.log
        document: dict[str, Any] = json.loads(self.log.splitlines()[-1])
        return document

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def trials(self) -> list[TrialRecord]:
        try:
            with open_store(self.store, create=False) as store:
                return store.trials("sample")
        except StoreError:  # not created yet
            return []


def _take_interrupts() -> None:
    """Shells have what they start in the background ignore them, the tests and so their children among it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def findings(trials: list[TrialRecord]) -> dict[str, tuple[str, int]]:
    """Per config what stands, in what two runs have in common: the kind, and bytes."""
    found = {}
    for trial in trials:
        outcome = standing_outcome(attempted_outcomes(trial))
        if isinstance(outcome, Measurement):
            found[trial.fingerprint] = ("measured", outcome.peak_memory_allocated_bytes)
        elif outcome is not None:
            found[trial.fingerprint] = (outcome.kind.value, outcome.requested_bytes or 0)
    return found


def ended(trials: list[TrialRecord]) -> Counter[str]:
    """How often each config was run to its end."""
    done = (AttemptState.COMPLETE, AttemptState.FAILED)
    return Counter(trial.fingerprint for trial in trials for attempt in trial.attempts if attempt.state in done)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    tuned = Tuned(tmp_path_factory.mktemp("undisturbed"))
    tuned.end()
    return tuned


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_trials_that_need_half_the_workers_run_at_the_same_time(undisturbed: Tuned) -> None:
    trials = undisturbed.trials
    assert len(trials) == 12
    assert set(ended(trials).values()) == {1}
    assert {kind for kind, _ in findings(trials).values()} == {"measured"}
    spans = [(t.config.gpus, a.started_at, a.finished_at) for t in trials for a in t.attempts if a.finished_at]
    both = [
        (x, y)
        for i, (x, began, ended_at) in enumerate(spans)
        for y, other, _ in spans[i + 1 :]
        if began <= other < ended_at
    ]
    assert (1, 1) in both


def test_a_second_driver_is_turned_away_and_the_first_can_be_interrupted(tmp_path: Path) -> None:
    tuned = Tuned(tmp_path)
    # Trials long enough that the first driver still has some to run when the second has been turned away. No early stop
    # shortens the warm-up.
    long = SPACE.replace("confirm_top: 0", "confirm_top: 0\n  warmup: 100")
    assert long != SPACE
    (tmp_path / "space.yaml").write_text(long)
    first = tuned.start()
    try:
        deadline = time.monotonic() + 180  # structures are traced before
        while not tuned.trials:
            assert first.poll() is None, tuned.log
            assert time.monotonic() < deadline
            time.sleep(0.2)
        command = [sys.executable, "-m", "autotune", "tune", str(tmp_path / "space.yaml"), "--store", tuned.store]
        second = subprocess.run([*command, "--out", str(tmp_path / "second")], capture_output=True, text=True, cwd=ROOT)
        assert second.returncode == 2, second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
        assert f"process {first.pid}" in second.stderr
        assert first.poll() is None
        first.send_signal(signal.SIGINT)  # as Ctrl-C does
        assert first.wait(timeout=60) == 130, tuned.log
        assert "interrupted; the same command goes on from here" in tuned.log
        assert stored_counts(tuned.trials).running == 0
    finally:
        first.kill()
        first.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_killed_at_ten_moments_ends_as_if_nothing_had_happened(undisturbed: Tuned, tmp_path: Path) -> None:
    tuned = Tuned(tmp_path)
    moments = random.Random(20261124)
    family: list[psutil.Process] = []
    kept: dict[str, tuple[str, int]] = {}
    cut_while_running = 0
    for _ in range(KILLS):
        process = tuned.start()
        time.sleep(moments.uniform(2, 16))
        if process.poll() is not None:
            break  # it has finished already
        cut_while_running += stored_counts(tuned.trials).running
        family += psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        now = findings(tuned.trials)
        assert {fingerprint: now.get(fingerprint) for fingerprint in kept} == kept  # nothing measured is lost
        kept = now
    tuned.end()
    assert cut_while_running  # else the kills fell where nothing ran
    assert findings(tuned.trials) == findings(undisturbed.trials)
    assert set(ended(tuned.trials).values()) == {1}
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [process.name() for process in alive]
