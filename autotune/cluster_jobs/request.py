"""What is submitted: a search-space file, its store and its output folder, checked before anything is sent."""

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from autotune import __version__
from autotune.errors import StoreError, UsageError
from autotune.space.file import read_space_file
from autotune.space.space import load_space
from autotune.spec.model import load_model
from autotune.store.connect import mask_url, parse_url, sqlite_path


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A study that may be submitted. Build it with `job_request`."""

    study: str
    model: str
    """The model as the search-space file names it."""
    space_path: Path
    store: str
    """Database URL as the cluster sees it; it holds no password."""
    out: str
    """Absolute folder on the cluster."""
    sampler: str | None
    """What `autotune tune --sampler` takes."""
    installed: bool = False
    """The job runs the Autotune that the cluster has installed, instead of this one, which is sent along."""
    words: tuple[str, ...] = ()
    """Of the command of the user's own script."""
    revision: str | None = None
    """Commit of the search-space file, see `git_revision`."""

    @property
    def entrypoint(self) -> str:
        """The job's shell command, run in the folder that `gather` fills."""
        command = ["python", "-m", "autotune", "tune", self.space_path.name, "--store", self.store, "--out", self.out]
        command += ["--address", "auto", "--json", *(("--sampler", self.sampler) if self.sampler else ())]
        return shlex.join(command)

    @property
    def check(self) -> str:
        """The shell command that examines the head node, the store and the output folder before the job is sent."""
        command = ["python", "-m", "autotune", "doctor", "--quick", "--store", self.store, "--out", self.out, "--json"]
        return shlex.join(command)

    @property
    def metadata(self) -> dict[str, str]:
        """What the dashboard shows of the job."""
        shown = {
            "study": self.study,
            "model": self.model,
            "autotune": "installed" if self.installed else __version__,
            "store": self.store,
            "out": self.out,
        }
        return shown | ({"git": self.revision} if self.revision else {})

    def gather(self, folder: Path) -> None:
        """Copy what the job reads: the search-space file, and the model's config and the files that the command of a
        user's own script names, where they lie beside it.
        """
        shutil.copy(self.space_path, folder)
        for path in (Path(self.model) / "config.json", *map(Path, self.words)):
            beside = not path.is_absolute() and ".." not in path.parts
            if beside and (self.space_path.parent / path).is_file():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.space_path.parent / path, folder / path)


def job_request(
    space_path: Path, *, store: str, out: Path | None = None, sampler: str | None = None, installed: bool = False
) -> JobRequest:
    """Check a study that is to be submitted.

    Args:
        space_path: the search-space file. A model folder may lie beside it, or at a path that the cluster has too.
        store: database URL as the cluster sees it.
        out: absolute folder on the cluster, see `output_folder`.
        sampler: what `autotune tune --sampler` takes.
        installed: run the Autotune of the cluster's own image.

    Raises:
        AutotuneError: the file, the model, the store or the folder is wrong.
    """
    file, _ = read_space_file(space_path)
    if file.cluster == "auto":
        load_model(file.model, space_path.parent)  # the rest is checked by the job: only the cluster knows its GPUs
    else:
        load_space(space_path)
    check_store(store)
    folder = output_folder(out, store, file.study)
    return JobRequest(
        study=file.study,
        model=file.model,
        space_path=space_path,
        store=store,
        out=folder,
        sampler=sampler,
        installed=installed,
        words=() if file.script is None else tuple(file.script.command),
        revision=git_revision(space_path),
    )


def git_revision(path: Path) -> str | None:
    """Commit of the working tree that a file lies in, with `-dirty` where the tree has changes; None without one."""
    command = [
        "git",
        "-C",
        str(path.absolute().parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
        "--exclude=*",
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def check_store(url: str) -> None:
    """Refuse a store that would not outlive the job, or whose password the dashboard would show.

    Raises:
        StoreError: a relative SQLite path, a password, or no database URL at all.
    """
    parsed, shown = parse_url(url), mask_url(url)
    if parsed.password is not None or any("password" in key for key in parsed.query):
        raise StoreError(
            f"store {shown}: a job's settings are shown on Ray's dashboard, so its URL must hold no password; write"
            " postgresql://USER@HOST/DATABASE and set PGPASSWORD or PGPASSFILE in the cluster's own environment"
        )
    if sqlite_path(parsed) is not None and not Path(str(parsed.database)).is_absolute():
        raise StoreError(
            f"store {shown}: a relative path lies in the job's temporary folder and is lost with it; write"
            " sqlite:////ABSOLUTE/PATH.db on storage that the cluster keeps, or postgresql://USER@HOST/DATABASE"
        )


def output_folder(out: Path | None, store: str, study: str) -> str:
    """The job's output folder on the cluster: `autotune-out/STUDY` beside a SQLite store by default.

    Raises:
        UsageError: it is relative, or missing where the store is a server.
    """
    if out is None:
        path = sqlite_path(parse_url(store))
        if path is None:
            raise UsageError("--out is missing: name an absolute folder for the best files, on storage of the cluster")
        return str(path.parent / "autotune-out" / study)
    if not out.is_absolute():
        raise UsageError(f"--out {out}: is a folder of the cluster, where a relative path is lost; make it absolute")
    return str(out)
