"""The best folder: each file from a measured trial, whole or not at all, the same bytes every time."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotune.errors import UsageError
from autotune.export import export_best
from autotune.formats.deepspeed_json import to_deepspeed
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Outcome
from autotune.store.store import SqlStore, open_store
from autotune.study import Study
from tests.samples import failure, measurement, sample_space, simulate


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as opened:
        yield opened


def finished_study(tmp_path: Path, store: SqlStore, outcome: Callable[[TrialConfig], Outcome], **changes: Any) -> Study:
    study = Study.open(sample_space(tmp_path, budget={"trials": 500}, **changes), store)
    left = iter(study.space.candidates)
    while attempt := study.next_attempt(lambda: next((c for c in left if not study.known(c)), None)):
        study.record(attempt, outcome(attempt.config))
    return study


def test_every_file_names_a_measured_trial(tmp_path: Path, store: SqlStore) -> None:
    def pytorch_is_faster(config: TrialConfig) -> Outcome:
        return measurement(2000.0 if config.engine == "pytorch" else 100.0 * config.micro_batch_size)

    study = finished_study(tmp_path, store, pytorch_is_faster)
    files = export_best(study, tmp_path / "out")
    winner, of_deepspeed = study.best(), study.best(engine="deepspeed")
    assert winner is not None
    assert of_deepspeed is not None
    assert winner.config.engine == "pytorch"
    best = yaml.safe_load(files["best.yaml"].read_text())
    assert TrialConfig.from_dict(best["config"]) == winner.config
    assert json.loads(files["ds_config.json"].read_text()) == to_deepspeed(of_deepspeed.config, study.space.workload)
    sources = json.loads(files["provenance.json"].read_text())["files"]
    assert sources["best.yaml"]["trial"] == winner.trial
    assert sources["ds_config.json"]["trial"] == sources["launch.sh"]["trial"] == of_deepspeed.trial
    assert "cannot express" in files["README.md"].read_text()


def test_without_a_deepspeed_trial_there_is_no_deepspeed_file(tmp_path: Path, store: SqlStore) -> None:
    search = {"engine": "pytorch", "zero_stage": [0, 3], "micro_batch_size": [1, 2]}
    study = finished_study(tmp_path, store, simulate, search=search, baseline=...)
    assert set(export_best(study, tmp_path / "out")) == {"best.yaml", "provenance.json", "README.md"}


def test_the_same_study_gives_the_same_bytes_and_replaces_the_old_folder(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate)
    first = {name: path.read_bytes() for name, path in export_best(study, tmp_path / "out").items()}
    (tmp_path / "out" / "best" / "stale.json").write_text("{}")
    second = {name: path.read_bytes() for name, path in export_best(study, tmp_path / "out").items()}
    assert first == second
    assert {path.name for path in (tmp_path / "out" / "best").iterdir()} == set(second)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["best"]


def test_nothing_is_written_without_an_eligible_trial(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, lambda _: failure())
    assert export_best(study, tmp_path / "out") == {}
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="--out"):
        export_best(study, tmp_path / "out")


def test_the_launch_script_starts_the_measured_number_of_ranks(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate)
    script = export_best(study, tmp_path / "out")["launch.sh"]
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tools / "torchrun").chmod(0o755)
    path = f"{tools}:{Path(shutil.which('bash') or '/bin/bash').parent}:/usr/bin:/bin"
    ran = subprocess.run([script, "train.py", "--mine"], env={"PATH": path}, capture_output=True, text=True, check=True)
    arguments = ran.stdout.splitlines()
    assert arguments[:3] == ["--standalone", "--nproc-per-node", "2"]
    assert arguments[3:] == [
        "train.py",
        "--mine",
        "--deepspeed",
        "--deepspeed_config",
        str(script.parent / "ds_config.json"),
    ]
    bare = subprocess.run([script], env={"PATH": path}, capture_output=True, text=True, check=False)
    assert bare.returncode != 0
    assert "name the training script" in bare.stderr
