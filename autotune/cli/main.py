"""The entry point: the verbs, and every error a user can cause as one sentence and an exit code."""

import gc
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from autotune import __version__
from autotune.cli import jobs, read
from autotune.cli.doctor import doctor
from autotune.cli.export import export
from autotune.cli.plan import plan
from autotune.cli.predict import predict
from autotune.cli.tune import tune
from autotune.errors import AutotuneError, ExitCode

app = typer.Typer(
    name="autotune",
    help="Finds the fastest safe training settings of a large language model by running short, real trials.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


NEW_OBJECTS = 100_000
"""After so many Python looks for garbage. With its own 700 a start of `tune` looks a thousand times through modules and
trials that live as long as the process, a sixth of the time (`benchmarks/study_start.py`)."""


def main() -> NoReturn:
    """Entry point: every error a user can cause is one sentence on stderr and an exit code."""
    gc.set_threshold(NEW_OBJECTS)
    try:
        code = app(standalone_mode=False) or ExitCode.DONE
    except typer.TyperException as error:  # its usage errors; `standalone_mode` would print them and exit for us
        error.show()  # type: ignore[attr-defined] # every usage error of typer has it
        code = ExitCode.USAGE
    except AutotuneError as error:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        code = error.exit_code
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    if code == ExitCode.INTERRUPTED:  # typer makes this code of most interrupts itself, without a word
        Console(stderr=True, soft_wrap=True).print("interrupted; the same command goes on from here")
    sys.exit(code)


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


app.command()(plan)
app.command()(tune)
app.command()(predict)
app.command()(read.studies)
app.command()(read.show)
app.command()(read.best)
app.command()(export)
app.command()(jobs.submit)
app.command()(jobs.status)
app.command()(jobs.logs)
app.command()(jobs.stop)
app.command()(jobs.fetch)
app.command()(doctor)
