"""`autotune plan`: what of a search space fits, and where the memory goes, without a GPU."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from autotune.cli.options import JsonOption, print_json
from autotune.errors import UsageError, shown

if TYPE_CHECKING:
    from autotune.space.space import Space
    from autotune.spec.config import TrialConfig


def plan(
    space_path: Annotated[Path, typer.Argument(metavar="SPACE", help="Search-space file (YAML).")],
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG",
            help="One config in full: `baseline`, or axes as in `zero_stage=3,micro_batch_size=4`, the rest like it.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict the memory of every candidate. No GPU is needed."""
    from autotune.space.space import load_space

    space = load_space(space_path)

    from autotune.report import plan as report
    from autotune.report.terminal import Tracing, say_measuring

    talk = Console(stderr=True)
    with Tracing(talk) as on_traced:
        if explain is not None:
            if space.file.script is not None and space.file.script.predict_as is None:
                raise UsageError(
                    f"--explain: {space.where} runs a script, of which nothing is predicted; say"
                    " script.predict_as: engine to take it to do what Autotune's engine does"
                )
            from autotune.predict.levers import explain as explained

            config = _config(space, explain)
            memory, levers = explained(space, config, on_traced)
            document, view = report.explanation_document, report.explanation_view
            if as_json:
                print_json(document(space, config, memory, levers))
            else:
                Console().print(view(space, config, memory, levers))
            return
        from autotune.predict.plan import plan_memory

        found = plan_memory(space, on_traced, lambda: say_measuring(talk))
    if as_json:
        print_json(report.plan_document(found))
    else:
        Console().print(report.plan_view(found))


def _config(space: "Space", text: str) -> "TrialConfig":
    """The config that `--explain` names.

    Raises:
        UsageError: it names no axis or no value of one, or the config is illegal.
    """
    import yaml

    from autotune.space.space import NOT_APPLICABLE

    baseline = space.baseline
    values = {axis: allowed[0] for axis, allowed in space.axes.items()}
    if baseline is not None:
        stated = space.values(baseline)
        values |= {axis: value for axis, value in stated.items() if value != NOT_APPLICABLE}
    if text == "baseline":
        if baseline is None:
            raise UsageError(f"--explain: {space.where} has no baseline; name axes, such as zero_stage=3")
        return baseline
    for item in text.split(","):
        axis, separator, stated_value = item.partition("=")
        axis = axis.strip()
        if not separator or axis not in space.axes:
            raise UsageError(
                f"--explain: found {shown(item)}; write AXIS=VALUE with axes among {', '.join(space.axes)}"
            )
        value = yaml.safe_load(stated_value) if stated_value.strip() else None
        if not isinstance(value, str | int | float):
            raise UsageError(f"--explain: {axis}: found {shown(stated_value)}; give one value")
        values[axis] = value
    try:
        config = space.config(values)
        refusal = space.refusal(config)
    except (TypeError, ValueError, ZeroDivisionError):
        raise UsageError(f"--explain: found {shown(text)}; a value has the wrong type for its axis") from None
    if refusal is not None:
        raise UsageError(f"--explain: {refusal}; change that value")
    return config
