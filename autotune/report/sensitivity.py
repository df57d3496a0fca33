"""What one step away from the winner does, in words."""

from rich.table import Table

from autotune.spec.sensitivity import Basis, Sensitivity, Step
from autotune.units import format_bytes

_BASES = {
    Basis.MEASURED: "measured, one short run",
    Basis.EXPECTED: "expected after all trials",
    Basis.PREDICTED: "predicted",
    Basis.ILLEGAL: "illegal",
}


def sensitivity_table(found: Sensitivity) -> Table:
    """A row for each step."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("one step", "speed", "80% within", "peak memory", "by"):
        table.add_column(title, justify="right" if title in ("speed", "80% within", "peak memory") else "left")
    for step in found.steps:
        table.add_row(*_cells(step))
    return table


def constraint_text(found: Sensitivity) -> str:
    """What holds the winner back."""
    return f"{found.constraint.value}: {found.because}"


def _cells(step: Step) -> list[str]:
    within = "" if step.low is None or step.high is None else f"{step.low:.2f}-{step.high:.2f}x"
    at_most = "<= " if step.note == "stopped early" else ""
    speed = "" if step.ratio is None else f"{at_most}{step.ratio:.2f}x"
    size = "" if step.device_used_bytes is None else format_bytes(step.device_used_bytes)
    if step.fit_probability is not None and not step.fits:
        speed, within = f"({speed})" if speed and step.basis is not Basis.MEASURED else speed, ""
        size = f"{size} does not fit".strip()
    by = f"trial {step.trial}" if step.trial is not None else _BASES[step.basis]
    return [f"{step.axis} {step.value}", speed, within, size, f"{by}: {step.note}" if step.note else by]
