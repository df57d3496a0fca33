"""The command line: instant help, one sentence and the right exit code for every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from autotune.store.store import open_store
from autotune.study import Study
from tests.samples import sample_space, simulate, space_text

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "deepspeed", "ray", "optuna", "sqlalchemy", "alembic")


def autotune(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autotune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)


def error_of(run: subprocess.CompletedProcess[str]) -> str:
    """The one sentence on stderr; nothing else may be there, and nothing on stdout."""
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom autotune.cli.main import app\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert 'tune' in result.output\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", ["tune", "studies", "show", "best"])
def test_every_verb_explains_itself(verb: str) -> None:
    run = autotune(verb, "--help")
    assert run.returncode == 0
    assert "--json" in run.stdout


def test_a_study_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    run = autotune("tune", str(ROOT / "search_spaces" / "qwen3-32b-sft-8xh100.yaml"), cwd=tmp_path)
    assert run.returncode == 5
    message = error_of(run)
    assert "8 x H100-80GB" in message
    assert "--address" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"serach": {}}, 2, "serach"),
        ({"model": "Qwen/Qwen3-33B"}, 2, "Qwen3-32B"),
        ({"cluster": {"gpus_per_node": 8, "gpu": "H1000"}}, 2, "H100-80GB"),
        ({"search": {"engine": "deepspeed", "precision": "fp16"}, "baseline": ...}, 3, "needs a GPU"),
    ],
)
def test_a_bad_file(tmp_path: Path, changes: dict[str, object], code: int, words: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text(**changes))
    run = autotune("tune", str(path), cwd=tmp_path)
    assert run.returncode == code
    assert words in error_of(run)
    assert not (tmp_path / "autotune.db").exists()


def test_stores_and_studies_that_do_not_exist(tmp_path: Path) -> None:
    run = autotune("studies", "--store", f"sqlite:///{tmp_path}/none.db")
    assert run.returncode == 2
    assert "none.db" in error_of(run)
    url = f"sqlite:///{tmp_path}/a.db"
    with open_store(url, create=True) as store:
        Study.open(sample_space(tmp_path), store)
    for verb in ("show", "best"):
        run = autotune(verb, "other", "--store", url)
        assert run.returncode == 2
        assert "sample" in error_of(run)
    assert autotune("show", "sample", "7", "--store", url).returncode == 2
    assert autotune("best", "sample", "--store", url).returncode == 3


def test_bad_usage_is_exit_2(tmp_path: Path) -> None:
    for arguments in (["tune"], ["tune", "a.yaml", "--sampler", "magic"], ["fly"], ["show", "s", "one"]):
        run = autotune(*arguments, cwd=tmp_path)
        assert run.returncode == 2
        assert "Traceback" not in run.stderr


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text())
    (tmp_path / "file").write_text("")
    run = autotune("tune", str(path), "--out", str(tmp_path / "file" / "out"), cwd=tmp_path)
    assert run.returncode == 2
    assert "--out" in error_of(run)


def test_tables_for_people(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    with open_store(url, create=True) as store:
        study = Study.open(sample_space(tmp_path), store)
        for config in study.space.candidates[:3]:
            attempt = study.next_attempt(lambda config=config: config)  # type: ignore[misc]
            assert attempt is not None
            study.record(attempt, simulate(attempt.config))
    shown = autotune("show", "sample", "--store", url)
    assert "(best)" in shown.stdout
    assert "deepspeed zero-3 fp32 mb 1" in shown.stdout
    assert "sample" in autotune("studies", "--store", url).stdout
