"""Options that several verbs share, and how they print."""

import json
from typing import Annotated, Any

import typer

DEFAULT_STORE = "sqlite:///autotune.db"

StoreOption = Annotated[
    str, typer.Option("--store", envvar="AUTOTUNE_STORE", help="Database URL: sqlite:///FILE or postgresql://...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY")]


def print_json(document: dict[str, Any]) -> None:
    """Print the one line that `--json` promises."""
    typer.echo(json.dumps(document))
