"""The best folder is packed and unpacked, and nothing else is."""

import base64
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from autotune.cluster_jobs.best_folder import MAX_BYTES, print_command, printed, unpack_best
from autotune.errors import ClusterError, UsageError


def pack(*members: tuple[str, bytes] | tarfile.TarInfo) -> str:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return base64.b64encode(packed.getvalue()).decode()


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


GOOD = ("best/best.yaml", b"a: 1\n")


@pytest.mark.parametrize(
    "packed",
    [
        pack(GOOD, ("best/../../outside", b"x")),
        pack(GOOD, ("/outside", b"x")),
        pack(GOOD, ("outside", b"x")),
        pack(GOOD, ("best/..", b"x")),
        pack(GOOD, ("best/a/b", b"x")),
        pack(GOOD, link("best/passwd", "/etc/passwd")),
        pack(GOOD, ("best/large", b"0" * (MAX_BYTES + 1))),
        pack(GOOD)[:60],
        pack(GOOD) + "!",
        "",
    ],
)
def test_a_folder_that_is_refused_changes_nothing(tmp_path: Path, packed: str) -> None:
    out = tmp_path / "out"
    unpack_best(pack(("best/old.yaml", b"old")), "there", out)
    with pytest.raises(ClusterError, match="there"):
        unpack_best(packed, "there", out)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path("out/best/old.yaml")]


def test_a_folder_is_printed_among_other_lines(tmp_path: Path) -> None:
    source = tmp_path / "it's here"
    (source / "best").mkdir(parents=True)
    (source / "best" / "launch.sh").write_bytes(os.urandom(5000))
    (source / "best" / "launch.sh").chmod(0o755)
    command = print_command(str(source))
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    packed = printed(f"Running entrypoint: {command}\n{run.stdout}The supervisor has ended\n")
    assert packed is not None
    [arrived] = unpack_best(packed, "there", tmp_path / "out")
    assert arrived.read_bytes() == (source / "best" / "launch.sh").read_bytes()
    assert os.access(arrived, os.X_OK)
    missing = subprocess.run(["sh", "-c", print_command(str(tmp_path / "none"))], capture_output=True, text=True)
    assert missing.returncode != 0
    assert printed(missing.stdout) is None


def test_the_report_comes_along(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "best").mkdir(parents=True)
    (source / "best" / "best.yaml").write_text("a: 1\n")
    (source / "report.html").write_text("<html>")
    run = subprocess.run(["sh", "-c", print_command(str(source))], capture_output=True, text=True, check=True)
    packed = printed(run.stdout)
    assert packed is not None
    assert unpack_best(packed, "there", out) == [out / "best" / "best.yaml", out / "report.html"]
    assert (out / "report.html").read_text() == "<html>"


def test_a_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    unpack_best(pack(("best/old.yaml", b"old")), "there", tmp_path)
    assert unpack_best(pack(GOOD), "there", tmp_path) == [tmp_path / "best" / "best.yaml"]
    assert [path.name for path in tmp_path.rglob("*")] == ["best", "best.yaml"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        unpack_best(pack(GOOD), "there", tmp_path / "file")
