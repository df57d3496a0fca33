"""A plan and the explanation of one config, in words for the terminal and as plain JSON data."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autotune.predict.levers import Lever
from autotune.predict.memory import predict_memory
from autotune.predict.plan import Plan
from autotune.report.speeds import UNCALIBRATED, Speeds, budget_cost, budget_gpu_hours
from autotune.report.terminal import headline
from autotune.space.space import NOT_APPLICABLE, Space
from autotune.spec.config import Scalar, TrialConfig
from autotune.spec.prediction import MemoryPrediction
from autotune.units import format_bytes

ROW_AXES = ("gpus", "method", "engine", "zero_stage", "offload", "precision")
BAR_WIDTH = 24


class Fit(NamedTuple):
    """How much fits under some axes' values, whatever the others are."""

    largest: int | None
    """Index of the candidate with the largest micro-batch that fits, of these the one that needs least; None: none."""
    next: int | None
    """Of the smallest micro-batch above that, or of the smallest where none fits; None: all fit."""


def plan_view(plan: Plan) -> RenderableType:
    """What fits, what does not and why, and the candidates that need least."""
    space = plan.space
    parts: list[RenderableType] = [headline(space), Text(), *_verdict(plan)]
    if plan.knows_memory:
        parts += [Text(), _matrix(plan)]
    reasons = list(_reasons(plan))
    if reasons:
        parts += [Text(), Text("What does not fit at any micro-batch, at its smallest:", "bold"), *reasons]
    parts += [Text(), *_refusals(space)]
    if smallest := plan.smallest(10):
        parts += [Text(), Text("The candidates that need least, one of each kind:", "bold"), _table(plan, smallest)]
    if fastest := plan.fastest(10):
        parts += [
            Text(),
            Text("Those that fit and should be fastest, one of each kind:", "bold"),
            _table(plan, fastest),
            Text(UNCALIBRATED, "dim"),
        ]
    elif plan.untimed and plan.knows_memory:
        parts += [Text(), Text(f"How fast candidates are is not predicted: {plan.untimed}.", "dim")]
    return Group(*parts)


def plan_document(plan: Plan) -> dict[str, Any]:
    """What `plan --json` prints."""
    space = plan.space
    baseline = space.baseline
    return {
        "study": space.name,
        "candidates": len(space.candidates),
        "illegal": sum(space.illegal.values()),
        "illegal_because": dict(space.illegal),
        "predicted_fit": int(plan.fits.sum()),
        "predicted_oom": int(plan.too_big.sum()),
        "surely_too_big": int(plan.surely_too_big.sum()),
        "unpredicted": sum(plan.unpredicted.values()),
        "unpredicted_because": dict(plan.unpredicted),
        "device_memory_bytes": space.cluster.memory_bytes,
        "usable_bytes": int(plan.space.usable_bytes),
        "budget_gpu_hours": budget_gpu_hours(space),
        "budget_cost": budget_cost(space),
        "baseline": None
        if baseline is None
        else {
            "config": baseline.to_dict(),
            "device_used_bytes": None if plan.baseline is None else plan.baseline.device_used_bytes,
        },
        "ranked_by": "memory" if plan.times is None else "tokens_per_second_per_gpu",
        "top": _top_documents(plan, plan.fastest(10) or plan.smallest(10)),
        "smallest": _top_documents(plan, plan.smallest(10)),
    }


def explanation_view(
    space: Space, config: TrialConfig, memory: MemoryPrediction, levers: list[Lever]
) -> RenderableType:
    """Where the memory of a config goes, and what one step of each lever does to it."""
    usable = space.usable_bytes
    fits = memory.device_used_bytes <= usable
    verdict = Text.assemble(
        (config.describe(), "bold"),
        f" needs {format_bytes(memory.device_used_bytes)} on {_fullest(memory)}: ",
        ("fits", "green") if fits else ("does not fit", "yellow"),
        f" in {format_bytes(usable)}",
        f" (probability {memory.fit_probability(usable):.2f})",
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for part, size in sorted(memory.breakdown.items(), key=lambda item: -item[1]):
        share = size / memory.device_used_bytes
        table.add_row(part.replace("_", " "), format_bytes(size), Text("█" * round(share * BAR_WIDTH), "cyan"))
    parts: list[RenderableType] = [verdict, Text(), table]
    if memory.host_bytes:
        parts.append(Text(f"and {format_bytes(memory.host_bytes)} of each node's main memory", "dim"))
    return Group(*parts, Text(), Text("One step of each lever:", "bold"), _lever_table(memory, levers, usable))


def explanation_document(
    space: Space, config: TrialConfig, memory: MemoryPrediction, levers: list[Lever]
) -> dict[str, Any]:
    """What `plan --explain --json` prints."""
    usable = space.usable_bytes
    return {
        "study": space.name,
        "config": config.to_dict(),
        "usable_bytes": int(usable),
        "fits": memory.device_used_bytes <= usable,
        **_memory_document(memory, usable),
        "levers": [
            {
                "axis": lever.axis,
                "value": lever.value,
                "device_used_bytes": None if lever.memory is None else lever.memory.device_used_bytes,
                "fits": None if lever.memory is None else lever.memory.device_used_bytes <= usable,
                "reason": lever.reason,
            }
            for lever in levers
        ],
    }


def _verdict(plan: Plan) -> Iterator[Text]:
    space = plan.space
    fit, out = int(plan.fits.sum()), int(plan.too_big.sum())
    total = len(space.candidates)
    if plan.knows_memory:
        yield Text.assemble(
            (f"{fit} of {total} candidates fit", "green" if fit else "yellow"),
            f" in {format_bytes(plan.space.usable_bytes)}, which is {format_bytes(space.cluster.memory_bytes)} less"
            f" {space.file.memory_headroom:.0%} headroom; {out} do not",
            f", {int(plan.surely_too_big.sum())} of them surely: `tune` launches none of those" if out else "",
        )
    if space.numerics:
        yield Text(f"Searched although it changes what is trained: {', '.join(space.numerics)}", "yellow")
    for reason, count in plan.unpredicted.most_common():
        yield Text(f"{count} cannot be predicted, and are searched without: {reason}", "yellow")
    if space.baseline is not None and plan.baseline is not None:
        size = plan.baseline.device_used_bytes
        verdict = "fits" if size <= plan.space.usable_bytes else "does not fit"
        yield Text(f"The baseline, {space.baseline.describe()}, needs {format_bytes(size)} and {verdict}.")
    cost = budget_cost(space)
    price = "" if cost is None else f", which is {cost:,.2f} at {space.file.price_per_gpu_hour:g} a GPU-hour"
    yield Text(f"The budget costs at most {budget_gpu_hours(space):g} GPU-hours{price}.", "dim")


def _matrix(plan: Plan) -> Table:
    """The largest micro-batch that fits: a row for each engine, stage and offload, a column for each checkpointing."""
    space = plan.space
    axes = _row_axes(space)
    checkpointing = _values(space, "activation_checkpointing")
    table = Table(
        box=None, pad_edge=False, title="Largest micro-batch that fits, and what it needs", title_justify="left"
    )
    for axis in axes:
        table.add_column(axis, no_wrap=True)
    for value in checkpointing:
        table.add_column(f"checkpointing {value}")
    for row in _rows(space, axes):
        cells = [_fit(plan, row | {"activation_checkpointing": (value,)}) for value in checkpointing]
        if any(fit is not None for fit in cells):
            names = ("/".join(str(value) for value in row[axis]) for axis in axes)
            table.add_row(*names, *(_fit_text(plan, fit) for fit in cells))
    return table


def _row_axes(space: Space) -> list[str]:
    return [axis for axis in ROW_AXES if len(_groups(space, axis)) > 1]


def _rows(space: Space, axes: Sequence[str]) -> Iterator[dict[str, tuple[Scalar, ...]]]:
    for values in itertools.product(*(_groups(space, axis) for axis in axes)):
        yield dict(zip(axes, values, strict=True))


def _groups(space: Space, axis: str) -> list[tuple[Scalar, ...]]:
    """The values of an axis, those together that need the same memory."""
    values = _values(space, axis)
    if axis != "precision":
        return [(value,) for value in values]
    half = tuple(value for value in values if value in ("bf16", "fp16"))
    return [group for group in (half, tuple(v for v in values if v not in half)) if group]


def _values(space: Space, axis: str) -> list[Scalar]:
    return [value for value in space.used(axis) if value != NOT_APPLICABLE]


def _fit(plan: Plan, values: dict[str, tuple[Scalar, ...]]) -> Fit | None:
    """How much fits among the candidates with these values; None where there are none, or none is predicted."""
    space = plan.space
    here = _predicted_with(plan, values)
    if not here.any():
        return None
    sizes = np.array(space.axes["micro_batch_size"], np.int64)[space.columns["micro_batch_size"]]
    fitting = here & plan.fits
    largest = _least(plan, fitting & (sizes == sizes[fitting].max())) if fitting.any() else None
    above = here & ~plan.fits & (sizes > sizes[largest] if largest is not None else True)
    following = _least(plan, above & (sizes == sizes[above].min())) if above.any() else None
    return Fit(largest, following)


def _least(plan: Plan, where: NDArray[np.bool_]) -> int:
    indexes = np.flatnonzero(where)
    return int(indexes[np.argmin(plan.device_used_bytes[indexes])])


def _fit_text(plan: Plan, fit: Fit | None) -> Text:
    if fit is None:
        return Text("-", "dim")
    found = Text()
    if fit.largest is not None:
        found.append(_size(plan, fit.largest), "green")
    if fit.next is not None:
        found.append(f" ({_size(plan, fit.next)})" if fit.largest is not None else _size(plan, fit.next), "yellow")
    return found


def _size(plan: Plan, at: int) -> str:
    return f"mb {plan.space.candidates[at].micro_batch_size}: {format_bytes(plan.device_used_bytes[at])}"


def _reasons(plan: Plan) -> Iterator[Text]:
    """For each row of the matrix under which nothing fits: where the memory of its smallest candidate goes."""
    axes = _row_axes(plan.space)
    for row in _rows(plan.space, axes):
        fit = _fit(plan, row)
        if fit is None or fit.largest is not None or fit.next is None:
            continue
        config = _with_first_keys(plan.space, plan.space.candidates[_least(plan, _predicted_with(plan, row))])
        memory = predict_memory(config, plan.space.model, plan.space.workload, plan.space.cluster)
        over = memory.device_used_bytes - plan.space.usable_bytes
        yield Text.assemble(
            (config.describe(), "bold"),
            f": {format_bytes(memory.device_used_bytes)}, {format_bytes(over)} too much: {_largest_parts(memory)}",
        )


def _predicted_with(plan: Plan, values: dict[str, tuple[Scalar, ...]]) -> NDArray[np.bool_]:
    """(candidates,): which have one of the values of each axis, and a prediction."""
    here = ~np.isnan(plan.device_used_bytes)
    for axis, allowed in values.items():
        here &= np.isin(plan.space.columns[axis], [plan.space.axes[axis].index(value) for value in allowed])
    return here


def _with_first_keys(space: Space, config: TrialConfig) -> TrialConfig:
    """The candidate with the first value of each DeepSpeed key, whose structure is traced already."""
    return replace(config, deepspeed=tuple((key, space.axes[f"deepspeed.{key}"][0]) for key, _ in config.deepspeed))


def _fullest(memory: MemoryPrediction) -> str:
    if not memory.layers_of_gpus:
        return "the fullest GPU"
    layers = ", ".join(map(str, memory.layers_of_gpus))
    return f"GPU {memory.gpu}, the fullest of {len(memory.layers_of_gpus)}, which have {layers} layers"


def _largest_parts(memory: MemoryPrediction, count: int = 4) -> str:
    parts = sorted(memory.breakdown.items(), key=lambda item: -item[1])[:count]
    where = f"GPU {memory.gpu}: " if memory.layers_of_gpus else ""
    return where + ", ".join(f"{part.replace('_', ' ')} {format_bytes(size)}" for part, size in parts)


def _refusals(space: Space) -> Iterable[Text]:
    if space.illegal:
        yield Text("Illegal combinations:", "bold")
    for reason, count in space.illegal.most_common(5):
        yield Text(f"{count:>7}  {reason}", "dim")
    if len(space.illegal) > 5:
        yield Text(f"         and {len(space.illegal) - 5} further reasons", "dim")


def _table(plan: Plan, indexes: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    speeds = None if plan.times is None else Speeds(plan, indexes)
    for title in [] if speeds is None else speeds.titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("needs", justify="right", no_wrap=True)
    table.add_column("of which")
    table.add_column("config")
    for at in indexes:
        config = plan.space.candidates[at]
        memory = predict_memory(config, plan.space.model, plan.space.workload, plan.space.cluster)
        needs = [format_bytes(memory.device_used_bytes), _largest_parts(memory, 2)]
        table.add_row(*([] if speeds is None else speeds.cells(at)), *needs, Text(config.describe()))
    return table


def _top_documents(plan: Plan, indexes: Sequence[int]) -> list[dict[str, Any]]:
    speeds = None if plan.times is None else Speeds(plan, indexes)
    return [_top_document(plan, at, speeds) for at in indexes]


def _top_document(plan: Plan, at: int, speeds: Speeds | None) -> dict[str, Any]:
    config = plan.space.candidates[at]
    memory = predict_memory(config, plan.space.model, plan.space.workload, plan.space.cluster)
    untimed: dict[str, Any] = dict.fromkeys(
        ("tokens_per_second_per_gpu", "step_time_seconds", "model_flops_utilization")
    )
    return {
        "config": config.to_dict(),
        **_memory_document(memory, plan.space.usable_bytes),
        **(untimed if speeds is None else speeds.document(at)),
    }


def _memory_document(memory: MemoryPrediction, usable: float) -> dict[str, Any]:
    return {
        "device_used_bytes": memory.device_used_bytes,
        "fit_probability": round(memory.fit_probability(usable), 4),
        "host_bytes": memory.host_bytes,
        "breakdown": {part.value: size for part, size in memory.breakdown.items()},
        **({"gpu": memory.gpu, "layers_of_gpus": memory.layers_of_gpus} if memory.layers_of_gpus else {}),
    }


def _lever_table(memory: MemoryPrediction, levers: list[Lever], usable: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("lever")
    table.add_column("changes by", justify="right")
    table.add_column("to", justify="right")
    table.add_column("")
    for lever in levers:
        name = f"{lever.axis} {lever.value}"
        if lever.memory is None:
            table.add_row(name, "", "", Text(lever.reason or "", "dim"))
            continue
        change = lever.memory.device_used_bytes - memory.device_used_bytes
        sign = "+" if change > 0 else "-" if change < 0 else ""
        fits = lever.memory.device_used_bytes <= usable
        table.add_row(
            name,
            Text(f"{sign}{format_bytes(abs(change))}", "green" if change < 0 else "yellow" if change > 0 else "dim"),
            format_bytes(lever.memory.device_used_bytes),
            Text("fits", "green") if fits else Text("does not fit", "yellow"),
        )
    return table
