"""`autotune doctor`: what will not work here, and the remedy."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autotune.cli.options import DEFAULT_STORE, JsonOption, StoreOption, print_json

if TYPE_CHECKING:
    from autotune.doctor.check import Check

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_NOT_USABLE = 1


def doctor(
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[Path, typer.Option(help="Folder where results would go.")] = Path("autotune-out"),
    address: Annotated[str | None, typer.Option(help="Connect to this Ray cluster as well.")] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Examine every node of the cluster at --address, not this machine.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what imports PyTorch and starts processes.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what will not work on this machine, or on a cluster, and the remedy.

    Exit code 0 when no check fails (warnings are allowed), 1 when one does. Nothing is changed or left behind.
    """
    from autotune.doctor.check import Status
    from autotune.doctor.diagnosis import diagnose, diagnose_cluster
    from autotune.search.address import require_reachable

    if cluster:
        known = address or os.environ.get("RAY_ADDRESS") or "auto"
        require_reachable(known)
        found = diagnose_cluster(address=known, out=out.absolute())
    else:
        found = diagnose(out=out, store=store, address=address, quick=quick)
    checks: list[Check] = []
    with Console(stderr=True).status(f"examining {'the cluster' if cluster else 'this machine'}") as status:
        for check in found:
            checks.append(check)
            status.update(f"examined {check.name}")
    usable = all(check.status is not Status.FAIL for check in checks)
    if as_json:
        print_json({"checks": [check.to_dict() for check in checks], "ok": usable})
    else:
        Console().print(_table(checks))
    raise typer.Exit(0 if usable else _NOT_USABLE)


def _table(checks: "list[Check]") -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        words = Text(check.found)
        if check.remedy:
            words.append(f"\n→ {check.remedy}", "dim")
        table.add_row(Text(check.status, _STYLES[check.status]), check.name, words)
    return table
