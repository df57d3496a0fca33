"""A study of which every trial runs out of memory: exit code 3, and what would fit."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autotune import metrics
from autotune.cli.main import app
from autotune.errors import ExitCode
from autotune.predict.plan import plan_memory
from autotune.search import cluster, runner
from autotune.space.space import load_space
from autotune.spec.outcome import FailureKind, Outcome
from autotune.study import Attempt, Study
from tests.samples import failure, measurement, space_text

SEARCH = {
    "engine": "pytorch",
    "precision": "fp32",
    "zero_stage": 0,
    "activation_checkpointing": "none",
    "micro_batch_size": [2, 4],
}


class Silent:
    """An observer that publishes nothing: there is no Ray."""

    def started(self, attempt: Attempt) -> None:
        pass

    def finished(self, attempt: Attempt, outcome: Outcome) -> None:
        pass


def hardly_too_big(path: Path) -> Path:
    """A space file whose smallest candidate needs half a percent more than there is: too close to be refused."""
    changes: dict[str, Any] = {"baseline": ..., "search": SEARCH, "memory_headroom": 0}
    path.write_text(space_text(**changes))
    needed = plan_memory(load_space(path)).device_used_bytes.min()
    limit = {"nodes": 1, "gpus_per_node": 2, "gpu": "cpu", "memory_bytes": int(needed * 0.995)}
    path.write_text(space_text(**changes, cluster=limit))
    return path


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([failure()], ExitCode.NOTHING_FEASIBLE),
        ([measurement(used_bytes=36 * 2**20, retries=1)], ExitCode.NOTHING_FEASIBLE),
        ([failure(FailureKind.INVALID_CONFIG)], ExitCode.EVERY_TRIAL_FAILED),
    ],
)
def test_the_exit_code_says_why_nothing_was_found_and_the_panel_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: list[Outcome], code: ExitCode
) -> None:
    def run(study: Study, *_: object) -> None:
        found: Iterator[Outcome] = iter(outcomes)
        candidates = (study.space.candidates[int(at)] for at in study.worth_a_launch)
        while (attempt := study.next_attempt(lambda: next(candidates, None))) is not None:
            study.record(attempt, next(found))

    monkeypatch.setattr(cluster, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(cluster, "require", lambda *_: None)
    monkeypatch.setattr(runner, "run_study", run)
    monkeypatch.setattr(metrics, "StudyMetrics", lambda _: Silent())
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["tune", str(hardly_too_big(tmp_path / "space.yaml")), "--store", f"sqlite:///{tmp_path}/a.db"]
    arguments += ["--out", str(tmp_path / "out")]
    for as_json in (False, True):
        result = CliRunner().invoke(app, [*arguments, "--json"] if as_json else arguments)
        assert result.exit_code == code, result.output
        if as_json:
            advice = json.loads(result.stdout.splitlines()[-1])["advice"]
            assert (advice is not None) == (code is ExitCode.NOTHING_FEASIBLE)
        elif code is ExitCode.NOTHING_FEASIBLE:
            assert "micro_batch_size: 1" in result.stdout
            assert "GPUs instead of 2" in result.stdout
            assert "none is eligible" in result.stdout
    assert not (tmp_path / "out" / "best").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_for_real(tmp_path: Path) -> None:
    space = hardly_too_big(tmp_path / "space.yaml")
    command = [sys.executable, "-m", "autotune", "tune", str(space), "--store", f"sqlite:///{tmp_path}/a.db"]
    run = subprocess.run([*command, "--out", f"{tmp_path}/out", "--json"], capture_output=True, text=True, check=False)
    assert run.returncode == 3, run.stderr
    document = json.loads(run.stdout.splitlines()[-1])
    assert document["trials"]["out_of_memory"] >= 1
    assert document["trials"]["complete"] == 0
    usable = load_space(space).usable_bytes
    assert document["advice"]
    assert all(one["device_used_bytes"] <= usable for one in document["advice"])
    assert "would fit" in run.stderr
