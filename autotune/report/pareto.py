"""The Pareto front of a study, tokens per second and GPU against peak memory, in the terminal."""

from rich.table import Table
from rich.text import Text

from autotune.report.speeds import cost_per_million_tokens
from autotune.study import Study
from autotune.units import format_bytes, format_rate


def pareto_table(study: Study) -> Table:
    """A row for each trial of the front, the fastest first; what a million tokens cost where a GPU-hour has a price."""
    front = study.pareto_front
    price = study.space.file.price_per_gpu_hour
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("tokens/s/GPU", justify="right")
    table.add_column("peak memory", justify="right")
    if price is not None:
        table.add_column("per million tokens", justify="right")
    table.add_column("config")
    for best in front:
        rate = best.measurement.tokens_per_second_per_gpu
        cost = cost_per_million_tokens(study.space, rate)
        cells = [str(best.trial), format_rate(rate), format_bytes(best.measurement.peak_device_used_bytes)]
        cells += [] if cost is None else [f"{cost:.3g}"]
        mark = "" if best.measurement.confirms else "  (one short run)"
        table.add_row(*cells, Text(best.config.describe() + mark))
    return table
