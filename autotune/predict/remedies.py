"""What would fit where nothing does: which lever beyond the axes, how many GPUs. By prediction, no GPU involved.

The start is the candidate that needs least. Each lever is tried alone, then all that cost only time together, then with
offload; and, by doublings, the number of GPUs. The first of each kind that fits is told.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from autotune.errors import NothingFeasibleError
from autotune.predict.memory import predict_memory
from autotune.predict.plan import Plan
from autotune.predict.tracing import OnTraced, structures_of, trace_structures
from autotune.results import Result
from autotune.space.space import Space
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import FailureKind, Measurement
from autotune.units import format_bytes

MOST_DOUBLINGS = 6
"""Of the number of GPUs that are tried."""

NO_REMEDY = f"neither a lever nor {2**MOST_DOUBLINGS} times as many GPUs would help"

_SMALLEST: dict[str, Any] = {"micro_batch_size": 1, "activation_checkpointing": "full", "selective_every": None}
_LEVERS: tuple[dict[str, Any], ...] = (
    {"micro_batch_size": 1},
    {"activation_checkpointing": "full", "selective_every": None},
    {"zero_stage": 3},
    {"precision": "bf16"},
    {"engine": "deepspeed", "offload": "optimizer"},
    {"engine": "deepspeed", "zero_stage": 3, "offload": "optimizer"},
    _SMALLEST | {"zero_stage": 3},
    _SMALLEST | {"engine": "deepspeed", "zero_stage": 3, "offload": "optimizer"},
    _SMALLEST | {"engine": "deepspeed", "zero_stage": 3, "offload": "optimizer+parameters"},
)
"""From what costs least to what costs most."""


class Remedy(NamedTuple):
    """Something that would fit."""

    words: str
    """What to change, as the file says it, or how many GPUs."""
    config: TrialConfig
    device_used_bytes: int


def remedies(plan: Plan, scale: float = 1.0, on_traced: OnTraced = lambda done, total: None) -> list[Remedy]:
    """Up to three changes under which the smallest candidate fits: a lever, one with offload, more GPUs.

    Args:
        plan: of a space of which nothing fits.
        scale: see `underestimate`.
        on_traced: told how many structures of how many are traced.
    """
    space = plan.space
    if not plan.knows_memory:
        return []
    start = space.candidates[int(np.nanargmin(plan.device_used_bytes))]
    tried = [*_moved(space, start), *_grown(space, start)]
    names = {name for larger, config, _ in tried for name in structures_of(larger, config)}
    reasons = trace_structures(names, on_traced)
    found: dict[str, Remedy] = {}
    for larger, config, words in tried:
        if any(name in reasons for name in structures_of(larger, config)):
            continue
        used = predict_memory(config, larger.model, larger.workload, larger.cluster).device_used_bytes
        kind = "gpus" if config.gpus != start.gpus else "offload" if config.offload != start.offload else "lever"
        if used * scale <= space.usable_bytes:
            found.setdefault(kind, Remedy(words, config, used))
    return list(found.values())


def underestimate(plan: Plan, results: Iterable[Result]) -> float:
    """What trials needed, at least where they ran out of it, as a multiple of what was predicted; 1.0 if no more."""
    ratios = [1.0]
    for _, config, outcome in results:
        predicted = plan.of(config)
        if predicted is None:
            continue
        if isinstance(outcome, Measurement):
            ratios.append(outcome.peak_device_used_bytes / predicted.device_used_bytes)
        elif outcome.kind is FailureKind.OUT_OF_MEMORY:
            ratios.append(plan.space.cluster.memory_bytes / predicted.device_used_bytes)
    return max(ratios)


def remedies_text(found: Sequence[Remedy]) -> str:
    """In a few words, also where there is none."""
    if not found:
        return NO_REMEDY
    return "would fit: " + "; ".join(f"{r.words} ({format_bytes(r.device_used_bytes)} a GPU)" for r in found)


def require_feasible(plan: Plan, on_traced: OnTraced = lambda done, total: None) -> None:
    """Refuse a study of which every candidate surely runs out of memory.

    Raises:
        NothingFeasibleError: it is one; the message has what the smallest candidate needs, and what would fit.
    """
    if not plan.surely_too_big.all():
        return
    space = plan.space
    at = int(np.argmin(plan.device_used_bytes))
    raise NothingFeasibleError(
        f"{space.where}: none of the {len(plan.device_used_bytes)} candidates fits in"
        f" {format_bytes(space.usable_bytes)}; the smallest, {space.candidates[at].describe()}, needs"
        f" {format_bytes(plan.device_used_bytes[at])}; {remedies_text(remedies(plan, on_traced=on_traced))}"
    )


def _moved(space: Space, start: TrialConfig) -> Iterator[tuple[Space, TrialConfig, str]]:
    """The start with each lever that changes it and is legal."""
    for lever in _LEVERS:
        try:
            config = replace(start, **lever)
        except ValueError:
            continue
        changed = {key: value for key, value in lever.items() if getattr(start, key) != value and value is not None}
        if config.engine != "deepspeed" and config.deepspeed:
            continue
        if changed and _is_legal(space, config):
            yield space, config, ", ".join(f"{key}: {value}" for key, value in changed.items())


def _grown(space: Space, start: TrialConfig) -> Iterator[tuple[Space, TrialConfig, str]]:
    """The start, and the start with every lever that costs only time, on more and more GPUs."""
    for doublings in range(1, MOST_DOUBLINGS + 1):
        gpus = start.gpus * 2**doublings
        nodes = -(-gpus // space.cluster.gpus_per_node)
        larger = replace(space, cluster=replace(space.cluster, nodes=max(nodes, space.cluster.nodes)))
        for lever in ({}, _SMALLEST | {"zero_stage": 3}):
            config = replace(start, gpus=gpus, **lever)
            changed = {key: value for key, value in lever.items() if getattr(start, key) != value and value is not None}
            if _is_legal(larger, config):
                words = [f"{gpus} GPUs instead of {start.gpus}"]
                yield larger, config, ", ".join(words + [f"{key}: {value}" for key, value in changed.items()])


def _is_legal(space: Space, config: TrialConfig) -> bool:
    try:
        return space.refusal(config) is None
    except (ValueError, ZeroDivisionError):
        return False
