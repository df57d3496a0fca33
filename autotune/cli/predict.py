"""`autotune predict`: what each case of a file will need, one JSON object a line."""

import json
from pathlib import Path
from typing import Annotated

import typer


def predict(
    cases: Annotated[Path, typer.Option("--cases", metavar="FILE", help="One JSON object a line.")],
) -> None:
    """Predict the memory of each case in a file. No GPU is needed."""
    from autotune.predict.cases import answers, read_cases

    for document in answers(read_cases(cases)):
        typer.echo(json.dumps(document))
