"""A study of a user's own script from its file to the command that starts the winner."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "search_spaces" / "own-script.yaml"
PLAIN = ROOT / "tests" / "trial" / "plain_script.py"


def tune(space: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "autotune", "tune", str(space), "--store", f"sqlite:///{folder}/a.db"]
    ran = subprocess.run(
        [*command, "--out", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=1700,
        cwd=folder,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return document


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def test_a_plain_script_is_tuned_and_started(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PLAIN.read_text())
    space = {
        "study": "plain",
        "model": "qwen3-tiny",
        "cluster": {"nodes": 1, "gpus_per_node": 1, "gpu": "cpu", "memory_bytes": "8MiB"},
        "workload": {"global_batch_size": 4, "sequence_length": 16},
        "script": {
            "command": "python train.py fine {width} {micro_batch_size} {gradient_accumulation_steps}",
            "environment": {"WIDTH": "{width}"},
        },
        "search": {
            "engine": "pytorch",
            "zero_stage": 0,
            "activation_checkpointing": "none",
            "micro_batch_size": 1,
            "script": {"width": [64, 512]},
        },
        "budget": {"trials": 5},
        "measure": {"micro_steps": 3, "confirm_top": 0},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    found = tune(tmp_path / "space.yaml", tmp_path)
    assert found["trials"] == {
        "complete": 1, "out_of_memory": 1, "failed": 0, "stopped_early": 0, "interrupted": 0
    }  # fmt: skip
    assert found["best"]["config"]["script"] == {"width": 64}
    assert found["prediction"]["measured"] == 0
    (rank,) = found["best"]["measurement"]["ranks"]
    speed = found["best"]["measurement"]["tokens_per_second_per_gpu"]
    # The script has told of 7 tokens an optimizer step, whatever the workload says.
    seconds = found["best"]["measurement"]["step_time_seconds"]
    assert rank["update_step_tokens"] == [7, 7]
    assert speed == pytest.approx(7 / seconds)
    artifacts = found["artifacts"]
    assert set(artifacts) == {"best.yaml", "launch.sh", "provenance.json", "README.md"}
    text = Path(artifacts["launch.sh"]).read_text()
    assert "export WIDTH=64\n" in text
    assert "--no-python \\\n  python train.py fine 64 1 4 " in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_shipped_example_and_the_command_of_its_winner(tmp_path: Path) -> None:
    found = tune(EXAMPLE, tmp_path)
    assert found["trials"]["out_of_memory"] >= 1
    assert found["trials"]["complete"] >= 2
    assert found["trials"]["failed"] == 0
    assert found["confirmation"]["winner"] == found["best"]["trial"]
    for rank in found["best"]["measurement"]["ranks"]:
        # Padding does not count: sequences are shorter than they may be.
        assert 0 < max(rank["long_run"]["step_tokens"]) < 32 * 128 / 2
    config, artifacts = found["best"]["config"], found["artifacts"]
    assert set(artifacts) == {"best.yaml", "training_args.yaml", "launch.sh", "provenance.json", "README.md"}
    assert yaml.safe_load(Path(artifacts["training_args.yaml"]).read_text())["gradient_accumulation_steps"] == (
        32 // 2 // config["micro_batch_size"]
    )
    # The same command, from the example's folder, trains: here on few conversations.
    ran = subprocess.run(
        [artifacts["launch.sh"], "--conversations", "128", "--max-length", "64"],
        cwd=EXAMPLE.parent,
        env=environment(OUTPUT=str(tmp_path / "trained")),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_the_example_differs_by_one_line_from_a_script_without_us() -> None:
    lines = (ROOT / "search_spaces" / "scripts" / "sft.py").read_text().splitlines()
    ours = [line for line in lines if "autotune" in line]
    assert len(ours) == 1
    compile("\n".join(line for line in lines if line not in ours), "sft.py", "exec")


def test_importing_us_loads_next_to_nothing() -> None:
    code = "import autotune, sys; print(len([m for m in sys.modules if m.split('.')[0] in ('torch', 'ray', 'yaml')]))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert ran.stdout.strip() == "0"
    code = "import autotune; autotune.report_step(loss=1.0)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
