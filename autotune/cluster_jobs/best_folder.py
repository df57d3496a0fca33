"""The best folder and the report on their way from the cluster: packed and printed by a short job, read from its log,
unpacked here.
"""

import base64
import binascii
import gzip
import io
import shlex
import shutil
import tarfile
import zlib
from pathlib import Path

from autotune.errors import ClusterError, UsageError

MAX_BYTES = 64 * 1024**2
"""A best folder is some kilobytes of text, a report some megabytes."""
REPORT = "report.html"

_BEGIN, _END = "autotune-best-begin", "autotune-best-end"


def print_command(folder: str) -> str:
    """The shell command that prints `folder/best` packed, with the report if there is one; it fails without `best`."""
    quoted = shlex.quote(folder)
    # Ray writes lines of its own to the same output while a command starts.
    return (
        f"sleep 1 && cd {quoted} && test -d best && echo {_BEGIN} &&"
        f" tar -cz best $(test -f {REPORT} && echo {REPORT}) | head -c {MAX_BYTES} | base64 && echo {_END}"
    )


def printed(log: str) -> str | None:
    """What that command has printed into a log, for `unpack_best`; None where it failed."""
    lines = log.splitlines()
    if _BEGIN not in lines or _END not in lines:
        return None
    return "".join(lines[lines.index(_BEGIN) + 1 : lines.index(_END)])


def unpack_best(packed: str, where: str, out: Path) -> list[Path]:
    """Replace `out/best` by the files of a packed folder of that name, and the report beside it if one was packed.

    Args:
        packed: both as base64 of a gzipped tar file.
        where: the folder's name, for errors.
        out: a folder, made where it is missing. Whatever goes wrong, a best folder that is there stays.

    Returns:
        The files.

    Raises:
        ClusterError: it is damaged, too large, or holds something that is no file of a best folder.
        UsageError: `out` cannot be written.
    """
    target, fresh, old = (out.absolute() / name for name in ("best", ".best.new", ".best.old"))
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        files, report = _read(packed, where)
        for name, content, mode in files:
            (fresh / name).write_bytes(content)
            (fresh / name).chmod(mode)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        if report is not None:
            (out / REPORT).write_bytes(report)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror}); name a writable folder with --out") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return [*sorted(target.iterdir()), *([] if report is None else [target.parent / REPORT])]


def _read(packed: str, where: str) -> tuple[list[tuple[str, bytes, int]], bytes | None]:
    """(name, content, mode) of every file of the best folder, and the report, if there is one."""
    files: list[tuple[str, bytes, int]] = []
    report, left = None, MAX_BYTES
    try:
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed, validate=True)), mode="r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.partition("/")
                left -= member.size
                if member.isdir() and not name:
                    continue
                content = archive.extractfile(member) if member.isreg() and left >= 0 else None
                if content is not None and member.name == REPORT:
                    report = content.read()
                    continue
                if content is None or folder != "best" or "/" in name or name in ("", ".", ".."):
                    raise ClusterError(
                        f"{where} on the cluster holds {member.name!r}, which is too large or no plain file;"
                        " move it out of the way"
                    )
                files.append((name, content.read(), 0o755 if member.mode & 0o100 else 0o644))
    except (binascii.Error, tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ClusterError(f"{where} did not arrive whole ({type(error).__name__}); fetch it again") from None
    return files, report
