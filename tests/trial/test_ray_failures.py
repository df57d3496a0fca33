"""Under Ray: the node's pool is killed, and the process that drives a trial; the gang goes and the study goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.samples import space_text
from tests.trial.gangs import ROOT, SMALL_BUCKETS

SCRIPT = Path(__file__).with_name("ray_failures.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_outlives_its_pool_and_its_trials_drivers(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    axes: dict[str, object] = {
        "engine": ["pytorch", "deepspeed"],
        "precision": "fp32",
        "zero_stage": 3,
        "micro_batch_size": 2,
    }
    axes |= {"activation_checkpointing": "none", "deepspeed": dict(SMALL_BUCKETS)}
    budget = {"trials": 2, "trial_seconds": 120}
    space.write_text(space_text(search=axes, baseline=..., budget=budget))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(space), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
        env={**os.environ, "PYTHONPATH": ROOT, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    # Behind the report Ray may say that workers were killed.
    (report,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    attempts = report["attempts"]
    assert [(a["trial"], a["outcome"]) for a in attempts] == [
        (trial, outcome) for trial in (1, 2) for outcome in ("worker_lost", "worker_lost", "measurement")
    ]
    assert {a["engine"] for a in attempts} == {"pytorch", "deepspeed"}
    for pool_killed, driver_killed, _ in (attempts[:3], attempts[3:]):
        assert "the node's pool" in pool_killed["message"]
        assert Path(pool_killed["log_path"]).exists()
        assert "the process that drove the trial" in driver_killed["message"]
        for attempt in (pool_killed, driver_killed):
            assert attempt["ranks"] == 2
            assert attempt["gang_gone_seconds"] < 30
    assert report["after"] == report["before"]
