"""`autotune submit`, `status`, `logs`, `stop` and `fetch`: a study as a job of a Ray cluster."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from autotune.cli.options import JsonOption, StoreOption, print_json
from autotune.cli.tune import Sampler
from autotune.errors import StoreError

if TYPE_CHECKING:
    from autotune.cluster_jobs.client import ClusterJobs, Job

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", help=f"Ray's dashboard (by default RAY_ADDRESS if that is http, else {DEFAULT_ADDRESS})."
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A study, for its latest job, or a job's id.")]


def submit(
    space_path: Annotated[Path, typer.Argument(metavar="SPACE", help="Search-space file (YAML).")],
    store: StoreOption,
    address: AddressOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Absolute folder on the cluster (by default autotune-out/STUDY beside a SQLite store)."),
    ] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="Who proposes the next config.")] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Run the Autotune that the cluster has, instead of sending this one.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run or resume a study as a job of a Ray cluster; it goes on when this machine is gone."""
    from autotune.cluster_jobs.request import job_request

    request = job_request(space_path, store=store, out=out, sampler=sampler, installed=installed)
    cluster = _connect(address)
    talk = Console(stderr=True, soft_wrap=True, highlight=False)
    with talk.status("examining the head node, the store and the output folder"):
        job, warnings = cluster.submit(request)
    for warning in warnings:
        talk.print(f"warning: {warning}", style="yellow")
    talk.print(f"submitted; `autotune logs -f {job.study}` follows it", style="dim")
    if as_json:
        print_json({"job": job.to_dict(), "warnings": warnings})
    else:
        typer.echo(job.id)


def status(
    name: NameArgument,
    address: AddressOption = None,
    store: Annotated[str | None, typer.Option(help="Database URL as seen from here (by default the job's).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a job's state, and the study's progress where its store can be read from here."""
    job = _connect(address).get(name)
    progress, reason = None, ""
    try:
        progress = _progress(job.study, store or job.store)
    except StoreError as error:
        reason = str(error)
    if as_json:
        print_json({"job": job.to_dict(), "study": progress})
    else:
        Console().print(_table(job, progress))
    if progress is None:
        talk = Console(stderr=True, soft_wrap=True)
        talk.print(f"no progress shown: {reason} (--store names it as seen from here)", style="dim", highlight=False)


def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    address: AddressOption = None,
) -> None:
    """Print what a job has printed."""
    cluster = _connect(address)
    job = cluster.get(name)
    for lines in cluster.follow(job) if follow else [cluster.logs(job)]:
        typer.echo(lines, nl=False)


def stop(name: NameArgument, address: AddressOption = None, as_json: JsonOption = False) -> None:
    """Stop a job; running trials are stored as interrupted, and `submit` resumes the study."""
    cluster = _connect(address)
    job = cluster.stop(cluster.get(name))
    if as_json:
        print_json({"job": job.to_dict()})
    else:
        typer.echo(f"{job.id} {job.state}")


def fetch(
    name: NameArgument,
    address: AddressOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the best files here (by default autotune-out/STUDY).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the best files of a study from the cluster to OUT/best, and its report to OUT."""
    cluster = _connect(address)
    job = cluster.get(name)
    files = cluster.fetch(job, out or Path("autotune-out") / job.study)
    if as_json:
        print_json({"study": job.study, "artifacts": {path.name: str(path) for path in files}})
    else:
        for path in files:
            typer.echo(str(path))


def _connect(address: str | None) -> "ClusterJobs":
    from autotune.search.authentication import authenticate

    if address is None:
        address = os.environ.get("RAY_ADDRESS", "")
        address = address if address.startswith(("http://", "https://")) else DEFAULT_ADDRESS
    authenticate(address)
    from autotune.cluster_jobs.client import ClusterJobs

    return ClusterJobs(address)


def _progress(study: str, store: str) -> dict[str, Any]:
    """How far a study is, from its store."""
    from dataclasses import asdict

    from autotune.store.store import open_store
    from autotune.study import Study

    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # a database that only the cluster can reach may not answer at all
    with open_store(store, create=False) as database:
        stored = Study.stored(database, study)
    best = stored.best()
    return {
        "trials": asdict(stored.counts),
        "budget": stored.space.file.budget.model_dump(include={"trials", "minutes", "gpu_hours"}, exclude_none=True),
        "best": None
        if best is None
        else {
            "trial": best.trial,
            "tokens_per_second_per_gpu": best.measurement.tokens_per_second_per_gpu,
            "config": best.config.to_dict(),
        },
    }


def _table(job: "Job", progress: dict[str, Any] | None) -> Table:
    from autotune.units import format_rate

    table = Table.grid(padding=(0, 2))
    state = job.state if job.driver_exit_code in (None, 0) else f"{job.state} with exit code {job.driver_exit_code}"
    table.add_row("job", f"{job.id}  {state}" + (f"  since {job.started_at:%Y-%m-%d %H:%M} UTC" if job.active else ""))
    table.add_row("said", job.message)
    table.add_row("page", job.page)
    if progress is None:
        return table
    trials = ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in progress["trials"].items())
    table.add_row("trials", f"{trials}; the budget is {progress['budget']['trials']}")
    best = progress["best"]
    if best is not None:
        speed = format_rate(best["tokens_per_second_per_gpu"]).strip()
        table.add_row("best", f"{speed} tokens/s/GPU (trial {best['trial']})")
    return table
