"""One config explained: where its memory goes, and what each lever would do to it."""

from collections.abc import Iterable
from typing import NamedTuple

from autotune.predict.memory import predict_memory
from autotune.predict.tracing import OnTraced, structures_of, trace_structures
from autotune.space.space import NOT_APPLICABLE, Space
from autotune.spec.config import Scalar, TrialConfig
from autotune.spec.prediction import MemoryPrediction


class Lever(NamedTuple):
    """One axis of a config moved by one step."""

    axis: str
    value: Scalar
    memory: MemoryPrediction | None
    """None where the step is illegal or cannot be predicted."""
    reason: str | None
    """Why it is, or cannot."""


def explain(
    space: Space, config: TrialConfig, on_traced: OnTraced = lambda done, total: None
) -> tuple[MemoryPrediction, list[Lever]]:
    """The memory of one legal config, and what one step of each axis, to either side, would do to it.

    Raises:
        UsageError: the engine refuses the config.
    """
    moved = list(moves(space, config))
    legal = [step for _, _, step, refusal in moved if refusal is None]
    names = {name for step in (config, *legal) for name in structures_of(space, step)}
    reasons = trace_structures(names, on_traced)

    def lever(axis: str, value: Scalar, step: TrialConfig, refusal: str | None) -> Lever:
        reason = refusal or next((reasons[name] for name in structures_of(space, step) if name in reasons), None)
        memory = None if reason else predict_memory(step, space.model, space.workload, space.cluster)
        return Lever(axis, value, memory, reason)

    memory = predict_memory(config, space.model, space.workload, space.cluster)
    return memory, [lever(*move) for move in moved]


def moves(space: Space, config: TrialConfig) -> Iterable[tuple[str, Scalar, TrialConfig, str | None]]:
    """(axis, value, config, why it is illegal) of each step of one axis, to either side."""
    values = space.values(config)
    stated = {axis: space.axes[axis][0] if value == NOT_APPLICABLE else value for axis, value in values.items()}
    for axis, allowed in space.axes.items():
        if values[axis] == NOT_APPLICABLE:
            continue
        at = allowed.index(values[axis]) if values[axis] in allowed else -1
        steps = allowed if at < 0 else [allowed[to] for to in (at - 1, at + 1) if 0 <= to < len(allowed)]
        for value in steps:
            moved = space.config(stated | {axis: value})
            yield axis, value, moved, space.refusal(moved)
