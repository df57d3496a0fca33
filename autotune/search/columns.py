"""A plan's candidates as the posterior takes them: what is predicted of each, and how alike they are."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autotune.predict.plan import Plan
from autotune.search.candidates import Candidates
from autotune.search.step_parts import step_columns
from autotune.space.space import NOT_APPLICABLE, Space
from autotune.spec.config import Scalar, TrialConfig

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
    found = [table[space.columns[axis]] for axis, table in _tables(space).items()]
    return np.hstack(found) if found else np.zeros((len(space.candidates), 1))


def rows_of(space: Space, configs: Sequence[TrialConfig]) -> NDArray[np.float64]:
    """The same columns of configs (M,) of any space. What is no value of an axis here is a number all the same, or as
    far from each choice as they are from each other.
    """
    found = []
    for axis, table in _tables(space).items():
        stated, allowed = [space.values(config)[axis] for config in configs], space.axes[axis]
        if table.shape[1] == 1 and _are_sizes(allowed):
            sizes = [np.log2(float(value)) if _are_sizes((value,)) else table[-1, 0] for value in stated]
            found.append(np.array(sizes, float)[:, None])
        else:
            other = np.zeros(table.shape[1])
            absent: dict[Scalar, NDArray[np.float64]] = {NOT_APPLICABLE: table[-1]}
            rows = [table[allowed.index(v)] if v in allowed else absent.get(v, other) for v in stated]
            found.append(np.array(rows, float))
    return np.hstack(found) if found else np.zeros((len(configs), 1))


def context_of(space: Space) -> tuple[float, ...]:
    """What all trials of a study have in common, in doublings: parameters, tokens a sequence, sequences a step."""
    fixed = (space.model.num_parameters, space.file.workload.sequence_length, space.workload.global_batch_size)
    return tuple(float(np.log2(size)) for size in fixed)


def _tables(space: Space) -> dict[str, NDArray[np.float64]]:
    """Of each axis with a choice, a row for each value, and at last one for where it does not apply."""
    found = {}
    for axis, values in space.axes.items():
        column = space.columns[axis]
        used = np.unique(column[column >= 0])
        if len(used) < 2:
            continue
        table = np.log2(np.array(values, float))[:, None] if _are_sizes(values) else np.eye(len(values)) / np.sqrt(2)
        found[axis] = np.concatenate([table, table[used].mean(axis=0, keepdims=True)])
    return found


def _are_sizes(values: Sequence[Scalar]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values)
