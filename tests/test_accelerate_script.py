"""A script on accelerate, started by the files of a winner whose ranks share sequences, trains like a plain loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from autotune.formats.accelerate_yaml import DEEPSPEED_FILE, to_accelerate
from autotune.formats.deepspeed_json import to_deepspeed
from tests.engines.parity import Trace, assert_equal, plain_training, request, tiny

SCRIPT = Path(__file__).with_name("accelerate_training_script.py")


@pytest.mark.slow
def test_a_script_whose_ranks_share_sequences(tmp_path: Path) -> None:
    trial = request("deepspeed", 3, sequence_parallel_size=2)
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(to_accelerate(trial.config, 1, "cpu")))
    (tmp_path / DEEPSPEED_FILE).write_text(json.dumps(to_deepspeed(trial.config, trial.workload)))
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    launch = ["accelerate", "launch", "--config_file", "accelerate.yaml", "--main_process_port", "0"]
    command = [*launch, str(SCRIPT), str(tmp_path / "report.json")]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-6000:]
    assert_equal(Trace(**json.loads((tmp_path / "report.json").read_text())), plain_training(tiny()))
