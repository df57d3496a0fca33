"""`autotune studies`, `show` and `best`: what a store knows."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from autotune.cli.options import DEFAULT_STORE, JsonOption, StoreOption, StudyArgument, print_json
from autotune.errors import NothingFeasibleError, StoreError

if TYPE_CHECKING:
    from autotune.spec.record import TrialRecord


def studies(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List the studies of a store."""
    from autotune.report.documents import studies_document
    from autotune.results import stored_counts
    from autotune.store.store import open_store

    with open_store(store, create=False) as database:
        rows = [(study, stored_counts(database.trials(study.name))) for study in database.studies()]
    if as_json:
        print_json(studies_document(rows))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("study", "created", "complete", "out of memory", "failed"):
        table.add_column(title, justify="left" if title in ("study", "created") else "right")
    for study, counts in rows:
        numbers = (str(number) for number in (counts.complete, counts.out_of_memory, counts.failed))
        table.add_row(study.name, f"{study.created_at:%Y-%m-%d %H:%M}", *numbers)
    Console().print(table)


def show(
    study: StudyArgument,
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
        print_json({"study": study, "trials": [trial_document(record) for record in chosen]})
        return
    if trial is not None:
        Console().print_json(json.dumps(trial_document(chosen[0])))
        return
    results = standing_results(trials)
    Console().print(trial_table(results, fastest(results, memory_headroom), memory_headroom))
    waiting = len(trials) - len(results)
    if waiting:
        Console(stderr=True).print(f"{waiting} more running or waiting to be run again", style="dim")


def best(
    study: StudyArgument,
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
        print_json({"study": study, "best": best_document(found)})
        return
    Console().print(trial_table([Result(*found)], found, memory_headroom))


def _stored_study(url: str, name: str) -> "tuple[list[TrialRecord], float]":
    """The study's trials and the memory headroom that its file asks for."""
    from autotune.space.file import parse_space
    from autotune.store.store import open_store

    with open_store(url, create=False) as database:
        trials = database.trials(name)
        record = database.study(name)
    assert record is not None  # `trials` raises for an unknown study
    return trials, parse_space(record.space_yaml, f"the stored space of study {name!r}").memory_headroom
