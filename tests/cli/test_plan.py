"""`autotune plan` as a person or a script uses it, and `tune` where nothing can fit."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autotune.cli.main import app
from autotune.errors import UsageError
from tests.cli.test_cli import autotune, error_of
from tests.samples import space_text

SEARCH = {
    "engine": "pytorch",
    "precision": "bf16",
    "zero_stage": [0, 1, 3],
    "activation_checkpointing": "full",
    "micro_batch_size": [1, 4],
}
BASELINE = {"engine": "pytorch", "zero_stage": 3, "micro_batch_size": 4}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "140")
        yield


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(space_text(search=SEARCH, baseline=BASELINE, cluster=a_cluster("20MiB"), price_per_gpu_hour=2.5))
    return path


def a_cluster(memory: str) -> dict[str, Any]:
    return {"nodes": 1, "gpus_per_node": 2, "gpu": "cpu", "memory_bytes": memory}


def last_line(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return document


def test_a_plan_as_json(space: Path) -> None:
    document = last_line(autotune("plan", str(space), "--json"))
    assert (document["candidates"], document["illegal"]) == (4, 2)
    assert document["predicted_fit"] + document["predicted_oom"] == 4
    assert document["predicted_fit"] == len(document["top"]) > 0
    assert document["predicted_oom"] > 0
    assert document["baseline"]["device_used_bytes"] > 0
    sizes = [entry["device_used_bytes"] for entry in document["smallest"]]
    assert sizes == sorted(sizes)
    speeds = [entry["tokens_per_second_per_gpu"] for entry in document["top"]]
    assert speeds == sorted(speeds, reverse=True)
    for entry in document["top"]:
        low, high = entry["tokens_per_second_per_gpu_80%"]
        assert low < entry["tokens_per_second_per_gpu"] < high
        assert entry["model_flops_utilization"] is None
        assert entry["cost_per_million_tokens"] == pytest.approx(
            2.5 / 3600 / entry["tokens_per_second_per_gpu"] * 1e6, rel=1e-3
        )
    assert document["budget_cost"] == pytest.approx(2.5 * document["budget_gpu_hours"], abs=0.01)
    for entry in document["top"]:
        assert sum(entry["breakdown"].values()) == entry["device_used_bytes"] <= document["usable_bytes"]


def test_a_plan_in_words(space: Path) -> None:
    shown = autotune("plan", str(space)).stdout
    assert "of 4 candidates fit in 18.8 MiB" in shown
    assert "`tune` launches none of those" in shown
    assert "The baseline, pytorch zero-3 bf16 mb 4 ckpt full, needs" in shown
    assert "zero_stage 1 does not exist on engine pytorch" in shown
    assert "optimizer states" in shown
    assert "at 2.5 a GPU-hour" in shown
    assert "80% of the trials should come out within these ranges" in " ".join(shown.split())


def test_one_config_explained(space: Path) -> None:
    document = last_line(autotune("plan", str(space), "--explain", "zero_stage=3, micro_batch_size=1", "--json"))
    assert document["fits"]
    assert sum(document["breakdown"].values()) == document["device_used_bytes"]
    levers = {(lever["axis"], lever["value"]): lever for lever in document["levers"]}
    assert set(levers) == {("zero_stage", 1), ("micro_batch_size", 4)}
    assert "does not exist" in levers["zero_stage", 1]["reason"]
    assert levers["micro_batch_size", 4]["device_used_bytes"] > document["device_used_bytes"]


def test_one_config_explained_in_words(space: Path) -> None:
    run = CliRunner().invoke(app, ["plan", str(space), "--explain", "baseline"])
    assert run.exit_code == 0
    assert "pytorch zero-3 bf16 mb 4 ckpt full needs" in run.output
    assert "micro_batch_size 1" in run.output


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("zero_stages=3", "found 'zero_stages=3'; write AXIS=VALUE"),
        ("zero_stage", "found 'zero_stage'; write AXIS=VALUE"),
        ("zero_stage=1", "zero_stage 1 does not exist"),
        ("zero_stage=", "give one value"),
        ("micro_batch_size=[1]", "give one value"),
        ("micro_batch_size=many", "has the wrong type"),
        ("micro_batch_size=3", "global_batch_size 16 is no multiple"),
    ],
)
def test_a_config_that_is_none(space: Path, stated: str, words: str) -> None:
    run = CliRunner().invoke(app, ["plan", str(space), "--explain", stated])
    assert isinstance(run.exception, UsageError)
    assert run.exception.exit_code == 2
    assert words in str(run.exception)


def test_a_plan_needs_to_know_the_hardware(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text(cluster="auto"))
    run = autotune("plan", str(path))
    assert run.returncode == 2
    assert "state nodes, gpus_per_node, gpu" in error_of(run)


@pytest.mark.slow
def test_tune_launches_nothing_where_nothing_fits(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text(search=SEARCH, baseline=..., cluster=a_cluster("2MiB")))
    run = autotune("tune", str(path), "--store", f"sqlite:///{tmp_path}/a.db", "--out", str(tmp_path / "out"))
    assert run.returncode == 3
    assert "none of the 4 candidates fits in 1.9 MiB" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_of_a_script_nothing_is_predicted(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    path = tmp_path / "space.yaml"
    script = {"command": "python train.py {training_args}"}
    path.write_text(space_text(script=script, search={**SEARCH, "zero_stage": 0}, baseline=...))
    run = CliRunner().invoke(app, ["plan", str(path)])
    assert run.exit_code == 0
    assert "2 cannot be predicted, and are searched without: they run a script" in " ".join(run.stdout.split())
    assert "candidates fit" not in run.stdout
    document = json.loads(CliRunner().invoke(app, ["plan", str(path), "--json"]).stdout.splitlines()[-1])
    assert (document["unpredicted"], document["predicted_oom"], document["top"]) == (2, 0, [])
    for command, words in [
        (["plan", str(path), "--explain", "micro_batch_size=4"], "runs a script, of which nothing is predicted"),
        (["tune", str(path), "--launcher", "ray-train"], "script: is run by launcher pool alone"),
    ]:
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, UsageError)
        assert words in str(refused.exception)
