"""The folder that a gang swaps in: its own, gone with it, and swept up after who could not remove it."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from autotune.errors import UsageError
from autotune.spec.nvme import stored_bytes
from autotune.spec.outcome import FailureKind
from autotune.trial.pool import NodePool
from autotune.trial.swap_folder import SwapFolder, lend, sweep
from tests.trial.gangs import ROOT, a_request, run

SWAPS = a_request("swaps", engine="deepspeed", zero_stage=3, offload="optimizer_nvme")


def test_it_is_there_until_it_is_closed(tmp_path: Path) -> None:
    first, second = SwapFolder(tmp_path, "a", 0), SwapFolder(tmp_path, "b", 0)
    (first.path / "rank0").mkdir()
    (first.path / "rank0" / "exp_avg.swp").write_bytes(b"states")
    assert sweep(tmp_path) == []
    assert set(tmp_path.iterdir()) == {first.path, second.path}
    first.close()
    assert list(tmp_path.iterdir()) == [second.path]
    second.close()


def test_ranks_that_start_by_themselves_share_one(tmp_path: Path) -> None:
    ranks = [SwapFolder(tmp_path, "a", 0) for _ in range(2)]
    ranks[0].close()
    assert list(tmp_path.iterdir()) == []
    ranks[1].close()


def test_what_a_killed_owner_left_is_swept_up_by_the_next(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from autotune.trial.swap_folder import SwapFolder; import sys, time\n"
        f"folder = SwapFolder(Path({str(tmp_path)!r}), 'killed', 0)\n"
        "(folder.path / 'states.swp').write_bytes(b'states'); print('held', flush=True); time.sleep(100)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    beside = tmp_path / "not-ours"
    beside.mkdir()
    assert sweep(tmp_path) == []
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    folder = SwapFolder(tmp_path, "next", 0)
    assert set(tmp_path.iterdir()) == {folder.path, beside}
    folder.close()


def test_a_disk_that_is_too_full_and_a_folder_that_is_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"is no folder on .* that can be written"):
        SwapFolder(tmp_path / "missing", "a", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1024**3))
    with pytest.raises(UsageError, match=r"has 1\.0+ GiB free, and the trial may write 2\.0+ GiB"):
        SwapFolder(tmp_path, "a", 2 * 1024**3)
    assert list(tmp_path.iterdir()) == []


def test_only_what_swaps_is_lent_one(tmp_path: Path) -> None:
    given = replace(SWAPS, nvme_path=str(tmp_path))
    request, folder = lend(given, "gang", ranks=2)
    assert folder is not None
    assert request.nvme_path == str(folder.path) != given.nvme_path
    folder.close()
    assert lend(replace(given, config=replace(SWAPS.config, offload="optimizer")), "gang", ranks=2)[1] is None


def test_what_is_asked_of_the_disk_is_one_nodes_share() -> None:
    four = replace(SWAPS.config, gpus=4)
    assert stored_bytes(four, SWAPS.model, 2) == 8 * SWAPS.model.num_parameters


@pytest.mark.parametrize("fault", ["swap.build@1", "swap.forward@all"])
def test_a_killed_trial_leaves_no_file(faulty: NodePool, tmp_path: Path, fault: str) -> None:
    result = run(faulty, a_request(fault, zero_stage=3, offload="optimizer_nvme", nvme_path=str(tmp_path)))
    assert result.failure is not None
    assert "was killed by SIGKILL" in result.failure.message  # and so had written its file
    assert list(tmp_path.iterdir()) == []


def test_a_trial_without_room_ends_before_it_starts(
    faulty: NodePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1024))
    result = run(faulty, replace(SWAPS, nvme_path=str(tmp_path)))
    assert result.failure is not None
    assert result.failure.kind is FailureKind.INVALID_CONFIG
    assert "make room or name another disk" in result.failure.message
