"""A plan's candidates as the posterior takes them: what is predicted of each, and how alike they are."""

import numpy as np
from numpy.typing import NDArray

from autotune.predict.plan import Plan
from autotune.search.expected_improvement import Candidates, step_columns
from autotune.space.space import Space

UNKNOWN_DEVIATION = 1.0
"""Of the memory of a candidate that cannot be predicted, as a ratio; half of the device is taken for its mean."""


def candidates_of(plan: Plan, left: NDArray[np.int64]) -> Candidates:
    """What a plan knows of some of its candidates, in columns."""
    space, count = plan.space, len(left)
    used, deviations = plan.device_used_bytes[left], plan.deviations[left]
    unknown = np.isnan(used)
    shares, unknowns, issued, throughput = np.zeros((count, 0)), np.zeros((0, 0)), None, np.ones(count)
    if plan.times is not None:
        times = plan.times.of(left)
        shares, unknowns, issued = step_columns(times)
        throughput = times.tokens_per_second_per_gpu
    return Candidates(
        features=features_of(space)[left],
        throughput=throughput,
        shares=shares,
        unknowns=unknowns,
        issued=issued,
        peak_bytes=np.where(unknown, 0.5 * space.usable_bytes, used),
        peak_deviation=np.where(unknown, UNKNOWN_DEVIATION, deviations),
        capacity_bytes=space.usable_bytes,
        cost=np.array(space.axes["gpus"], float)[space.columns["gpus"][left]],
    )


def features_of(space: Space) -> NDArray[np.float64]:
    """(candidates, D): numbers by their logarithm to base 2, other choices one unit apart from each other.

    Where an axis does not apply, its columns are at their middle.
    """
    found: list[NDArray[np.float64]] = []
    for axis, values in space.axes.items():
        column = space.columns[axis]
        used = np.unique(column[column >= 0])
        if len(used) < 2:
            continue
        if all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values):
            table = np.log2(np.array(values, float))[:, None]
        else:
            table = np.eye(len(values)) / np.sqrt(2)
        middle = table[used].mean(axis=0, keepdims=True)
        found.append(np.concatenate([table, middle])[column])
    return np.hstack(found) if found else np.zeros((len(space.candidates), 1))
