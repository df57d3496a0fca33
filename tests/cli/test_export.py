"""`autotune export` needs nothing but the store."""

import json
from pathlib import Path

import pytest
import yaml

from autotune.store.store import open_store
from autotune.study import Study
from tests.cli.test_cli import autotune, error_of
from tests.samples import failure, measurement, sample_space


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A study whose winner runs on DeepSpeed; its file is gone."""
    url = f"sqlite:///{tmp_path}/a.db"
    with open_store(url, create=True) as database:
        study = Study.open(sample_space(tmp_path), database)
        for config in study.space.candidates[:3]:
            attempt = study.next_attempt(lambda config=config: config)  # type: ignore[misc]
            assert attempt is not None
            study.record(attempt, measurement(100.0))
    (tmp_path / "space.yaml").unlink()
    return url


def test_one_format_goes_to_stdout_or_into_a_folder(store: str, tmp_path: Path) -> None:
    run = autotune("export", "sample", "--format", "training-args", "--store", store)
    assert run.returncode == 0, run.stderr
    arguments = yaml.safe_load(run.stdout)
    assert arguments["per_device_train_batch_size"] == 1
    run = autotune("export", "sample", "--format", "accelerate", "--store", store, "--out", str(tmp_path / "to"))
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"accelerate.yaml", "ds_config.json"}
    assert run.stdout.split() == [str(tmp_path / "to" / name) for name in ("accelerate.yaml", "ds_config.json")]


def test_without_a_format_the_whole_folder_is_written(store: str, tmp_path: Path) -> None:
    run = autotune("export", "sample", "--store", store, "--out", str(tmp_path / "all"), "--json")
    assert run.returncode == 0, run.stderr
    files = json.loads(run.stdout)["files"]
    assert {"best.yaml", "ds_config.json", "training_args.yaml", "accelerate.yaml", "README.md"} <= set(files)
    assert all(Path(path).is_file() for path in files.values())


def test_mistakes_are_one_sentence(store: str, tmp_path: Path) -> None:
    unknown = autotune("export", "sample", "--format", "toml", "--store", store)
    assert unknown.returncode == 2
    assert "training-args" in error_of(unknown)
    nobody = autotune("export", "nobody", "--format", "best", "--store", store)
    assert nobody.returncode == 2
    assert "sample" in error_of(nobody)
    (tmp_path / "file").write_text("")
    closed = autotune("export", "sample", "--format", "best", "--store", store, "--out", str(tmp_path / "file" / "x"))
    assert closed.returncode == 2
    assert "--out" in error_of(closed)


def test_a_study_without_a_winner_has_nothing_to_export(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/b.db"
    with open_store(url, create=True) as database:
        study = Study.open(sample_space(tmp_path), database)
        attempt = study.next_attempt(lambda: None)
        assert attempt is not None
        study.record(attempt, failure())
    for arguments in ([], ["--format", "best"]):
        run = autotune("export", "sample", "--store", url, *arguments, cwd=tmp_path)
        assert run.returncode == 3
        assert "no eligible trial" in error_of(run)
    assert {path.name for path in tmp_path.iterdir()} == {"b.db", "space.yaml"}
