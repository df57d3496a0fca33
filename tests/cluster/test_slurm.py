"""The sbatch file on a real Slurm of one node, made of Debian's packages, in namespaces of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.spec.outcome import Failure
from autotune.store.store import open_store
from tests.cluster_jobs.head import environment, write_space

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "cluster" / "slurm" / "autotune.sbatch"
HERE = Path(__file__).parent


def test_it_is_a_shell_script() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_is_stopped_and_resumed_by_slurm(tmp_path: Path) -> None:
    missing = [tool for tool in ("sbatch", "slurmctld", "slurmd", "munged", "unshare") if not shutil.which(tool)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, and {', '.join(missing) or 'nothing else'} (Debian's packages slurm-wlm and munge)")
    space = write_space(tmp_path, 100, "slurm-test")
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash"]
    command += [
        str(HERE / "single_node_slurm.sh"),
        str(tmp_path),
        str(HERE / "stop_and_resume.sh"),
        str(SBATCH),
        str(space),
    ]
    variables = environment("") | {"PYTHONPATH": str(ROOT), "AUTOTUNE_VENV": str(Path(sys.executable).parents[1])}
    variables.pop("RAY_AUTH_TOKEN")
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=variables, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    first, second = ((tmp_path / "work" / f"autotune-{job}.log").read_text() for job in (1, 2))
    assert "stopping the study" in first
    assert re.search(r"resumed with \d+ finished trial", second), second
    assert "[4/4] trial" in second
    work = tmp_path / "work" / "autotune-out"
    assert (work / "slurm-test" / "best" / "best.yaml").is_file()
    assert not list(work.glob(".driver-*"))
    with open_store(f"sqlite:///{work}/studies.db", create=False) as store:
        trials = store.trials("slurm-test")
    ended = [[a for a in trial.attempts if a.state in ("complete", "failed")] for trial in trials]
    assert [len(attempts) for attempts in ended] == [1] * 4  # none twice, none lost
    cut = [a for trial in trials for a in trial.attempts if a.state == "interrupted"]
    assert cut
    reasons = [a.outcome.message for a in cut if isinstance(a.outcome, Failure)]
    assert len(reasons) == len(cut)
    assert all("stopped" in reason for reason in reasons)  # said by the driver, in time
