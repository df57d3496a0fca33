"""`autotune studies`, `show` and `best`: what a store knows."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from autotune.cli.options import DEFAULT_STORE, JsonOption, StoreOption, StudyArgument, print_json
from autotune.errors import NothingFeasibleError, StoreError, UsageError

if TYPE_CHECKING:
    from autotune.study import Study


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
    why: Annotated[bool, typer.Option("--why", help="Why the sampler launched the trial.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List a study's trials, or show one of them in full."""
    from autotune.report.documents import trial_document
    from autotune.report.terminal import trial_table, why_text
    from autotune.results import standing_results
    from autotune.store.store import open_store
    from autotune.study import Study

    with open_store(store, create=False) as database:
        trials = database.trials(study)
        chosen = [record for record in trials if trial in (None, record.number)]
        if not chosen and trial is not None:
            raise StoreError(f"study {study!r} has no trial {trial}; it has {len(trials)} trials")
        if as_json:
            print_json({"study": study, "trials": [trial_document(record) for record in chosen]})
            return
        if why:
            if trial is None:
                raise UsageError("--why explains one trial; name it, as in `autotune show STUDY 7 --why`")
            Console().print(why_text(chosen[0]), soft_wrap=True)
            return
        if trial is not None:
            Console().print_json(json.dumps(trial_document(chosen[0])))
            return
        stored = Study.stored(database, study)
    results = standing_results(trials)
    Console().print(trial_table(results, stored))
    _print_sensitivity(stored)
    waiting = len(trials) - len(results)
    if waiting:
        Console(stderr=True).print(f"{waiting} more running or waiting to be run again", style="dim")


def _print_sensitivity(stored: "Study") -> None:
    from autotune.report.sensitivity import constraint_text, sensitivity_table

    if (found := stored.sensitivity) is None:
        return
    console = Console()
    console.print(f"\nOne step away from trial {found.trial}, the best:", highlight=False)
    console.print(sensitivity_table(found))
    console.print(f"Limited by {constraint_text(found)}.", highlight=False)


def best(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show a study's fastest eligible trial, what one step from it does, and the best trades of speed for memory."""
    from autotune.report.documents import best_document, pareto_document
    from autotune.report.pareto import pareto_table
    from autotune.report.terminal import trial_table
    from autotune.results import Result
    from autotune.store.store import open_store
    from autotune.study import Study

    with open_store(store, create=False) as database:
        stored = Study.stored(database, study)
    found = stored.best()
    if found is None:
        finished = stored.counts.finished
        raise NothingFeasibleError(f"study {study!r} has no eligible trial among its {finished} finished ones")
    if as_json:
        sensitivity = None if stored.sensitivity is None else stored.sensitivity.to_dict()
        document = {"study": study, "best": best_document(found, stored.space), "sensitivity": sensitivity}
        print_json(document | {"pareto": pareto_document(stored)})
        return
    Console().print(trial_table([Result(*found)], stored))
    if len(stored.pareto_front) > 1:
        Console().print("\nThe best trades of speed for memory:", highlight=False)
        Console().print(pareto_table(stored))
    _print_sensitivity(stored)
