"""`benchmarks/gpu/smoke.py` on the devices that there are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SMOKE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "smoke.py"


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_every_way_a_trial_can_end(device: str) -> None:
    done = subprocess.run([sys.executable, SMOKE, "--device", device, "--json"], capture_output=True, text=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert [check for check in report["checks"] if not check["passed"]] == []
    assert len(report["trials"]) == 5
    assert done.returncode == 0
