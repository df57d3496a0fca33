"""`autotune export`: a study's winner as files for other tools, from the store alone."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from autotune.cli.options import DEFAULT_STORE, JsonOption, StoreOption, StudyArgument, print_json
from autotune.errors import NothingFeasibleError, UsageError


def export(
    study: StudyArgument,
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="One file: best, training-args, deepspeed-hf, deepspeed, accelerate, train-script or script."
            " Without it: the whole folder.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write to. Without it, one format is printed, the whole goes to autotune-out/STUDY."
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="A folder for each of the best trades of speed for memory, in DIR/pareto."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write or print the winner's files; refuses a format that cannot express the winner."""
    from autotune.export import export_best, export_files, export_pareto
    from autotune.store.store import open_store
    from autotune.study import Study

    with open_store(store, create=False) as database:
        stored = Study.stored(database, study)
    if pareto and fmt is not None:
        raise UsageError("--pareto writes whole folders; leave out --format")
    if fmt is None:
        paths = (export_pareto if pareto else export_best)(stored, out or Path("autotune-out") / study)
        if not paths:
            finished = stored.counts.finished
            raise NothingFeasibleError(f"study {study!r} has no eligible trial among its {finished} finished ones")
        files = {name: str(path) for name, path in paths.items()}
    else:
        texts = export_files(stored, fmt)
        files = texts if out is None else _write(texts, out)
    if as_json:
        print_json({"study": study, "format": fmt, "files": files})
    elif fmt is not None and out is None:
        first, *others = files
        typer.echo(files[first], nl=False)
        for other in others:
            Console(stderr=True, soft_wrap=True).print(f"{first} needs {other} beside it; --out DIR writes both")
    else:
        for path in files.values():
            typer.echo(path)


def _write(texts: dict[str, str], out: Path) -> dict[str, str]:
    folder = out.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            fresh = folder / f".{name}.new"
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(folder / name)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); name a writable folder with --out") from None
    return {name: str(folder / name) for name in texts}
