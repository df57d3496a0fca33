"""The command line. It builds the parts and hands them to the study.

Data goes to stdout, talk to stderr. Heavy libraries are imported by the verbs that need them, so that `--help` is
instant.
"""

import json
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autotune import __version__
from autotune.errors import AutotuneError, ExitCode, NothingFeasibleError, StoreError, UsageError

if TYPE_CHECKING:
    from autotune.spec.record import TrialRecord
    from autotune.study import Study

app = typer.Typer(
    name="autotune",
    help="Finds the fastest safe training settings of a large language model by running short, real trials.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Sampler(StrEnum):
    """What `--sampler` takes; `autotune.search.samplers` builds them."""

    TPE = "tpe"
    GP = "gp"
    RANDOM = "random"


DEFAULT_STORE = "sqlite:///autotune.db"

StoreOption = Annotated[
    str, typer.Option("--store", envvar="AUTOTUNE_STORE", help="Database URL: sqlite:///FILE or postgresql://...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]


def main() -> NoReturn:
    """Entry point: every error a user can cause is one sentence on stderr and an exit code."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code or ExitCode.DONE)
    except typer.TyperException as error:  # its usage errors; `standalone_mode` would print them and exit for us
        error.show()  # type: ignore[attr-defined] # every usage error of typer has it
        sys.exit(ExitCode.USAGE)
    except AutotuneError as error:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on from here")
        sys.exit(ExitCode.INTERRUPTED)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autotune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """See the verbs."""


@app.command()
def tune(
    space_path: Annotated[Path, typer.Argument(metavar="SPACE", help="Search-space file (YAML).")],
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[Path | None, typer.Option(help="Folder for logs and best files [autotune-out/STUDY].")] = None,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster; without it, one is started here.")
    ] = None,
    sampler: Annotated[Sampler, typer.Option(help="Who proposes the next config.")] = Sampler.TPE,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Run or resume a study; print the best config and where its files are."""
    from autotune.space.file import read_space_file
    from autotune.space.space import load_space

    talk = Console(stderr=True)
    file, _ = read_space_file(space_path)
    space = None if file.cluster == "auto" else load_space(space_path)

    from autotune.search.authentication import authenticate

    authenticate(address)
    from autotune.search.cluster import connected, detect, require, require_local

    if space is not None and address is None:
        require_local(space.cluster)
    folder = _output_folder(out or Path("autotune-out") / file.study)

    from autotune.export import export_best
    from autotune.report.documents import study_document
    from autotune.report.terminal import Progress, result_panel
    from autotune.search.runner import run_study
    from autotune.search.samplers import SamplerName
    from autotune.store.store import open_store
    from autotune.study import Study

    with open_store(store, create=True) as database, connected(address, space.cluster if space else None):
        # Ray replaces the handler when it starts.
        signal.signal(signal.SIGTERM, _interrupt)
        if space is None:
            space = load_space(space_path, detect())
        require(space.cluster)
        study = Study.open(space, database)
        with Progress(study, talk) as progress:
            study.observers.append(progress)
            run_study(study, SamplerName(sampler), folder / "logs", seed)
        artifacts = export_best(study, folder)
    (talk if as_json else Console()).print(result_panel(study, artifacts))
    if as_json:
        _print_json(study_document(study, artifacts))
    raise typer.Exit(_exit_code(study))


@app.command()
def studies(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List the studies of a store."""
    from autotune.report.documents import studies_document
    from autotune.results import stored_counts
    from autotune.store.store import open_store

    with open_store(store, create=False) as database:
        rows = [(study, stored_counts(database.trials(study.name))) for study in database.studies()]
    if as_json:
        _print_json(studies_document(rows))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("study", "created", "complete", "out of memory", "failed"):
        table.add_column(title, justify="left" if title in ("study", "created") else "right")
    for study, counts in rows:
        numbers = (str(number) for number in (counts.complete, counts.out_of_memory, counts.failed))
        table.add_row(study.name, f"{study.created_at:%Y-%m-%d %H:%M}", *numbers)
    Console().print(table)


@app.command()
def show(
    study: Annotated[str, typer.Argument(metavar="STUDY")],
    trial: Annotated[int | None, typer.Argument(metavar="[TRIAL]", help="One trial in full.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List a study's trials, or show one of them in full."""
    from autotune.report.documents import trial_document
    from autotune.report.terminal import trial_table
    from autotune.results import fastest, standing_results

    trials, memory_headroom = _stored_study(store, study)
    chosen = [record for record in trials if trial in (None, record.number)]
    if not chosen and trial is not None:
        raise StoreError(f"study {study!r} has no trial {trial}; it has {len(trials)} trials")
    if as_json:
        _print_json({"study": study, "trials": [trial_document(record) for record in chosen]})
        return
    if trial is not None:
        Console().print_json(json.dumps(trial_document(chosen[0])))
        return
    results = standing_results(trials)
    Console().print(trial_table(results, fastest(results, memory_headroom), memory_headroom))
    waiting = len(trials) - len(results)
    if waiting:
        Console(stderr=True).print(f"{waiting} more running or waiting to be run again", style="dim")


@app.command()
def best(
    study: Annotated[str, typer.Argument(metavar="STUDY")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show a study's fastest eligible trial."""
    from autotune.report.documents import best_document
    from autotune.report.terminal import trial_table
    from autotune.results import Result, fastest, standing_results

    trials, memory_headroom = _stored_study(store, study)
    results = standing_results(trials)
    found = fastest(results, memory_headroom)
    if found is None:
        raise NothingFeasibleError(f"study {study!r} has no eligible trial among its {len(results)} finished ones")
    if as_json:
        _print_json({"study": study, "best": best_document(found)})
        return
    Console().print(trial_table([Result(*found)], found, memory_headroom))


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _output_folder(out: Path) -> Path:
    folder = out.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); name a writable folder with --out") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder}: is not writable; name a writable folder with --out")
    return folder


def _stored_study(url: str, name: str) -> "tuple[list[TrialRecord], float]":
    """The study's trials and the memory headroom that its file asks for."""
    from autotune.space.file import parse_space
    from autotune.store.store import open_store

    with open_store(url, create=False) as database:
        trials = database.trials(name)
        record = database.study(name)
    assert record is not None  # `trials` raises for an unknown study
    return trials, parse_space(record.space_yaml, f"the stored space of study {name!r}").memory_headroom


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document))


def _exit_code(study: "Study") -> ExitCode:
    counts = study.counts
    if study.best() is not None:
        return ExitCode.DONE
    if counts.failed and not counts.out_of_memory and not counts.complete:
        return ExitCode.EVERY_TRIAL_FAILED
    return ExitCode.NOTHING_FEASIBLE
