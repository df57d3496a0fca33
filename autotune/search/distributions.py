"""A search space in Optuna's terms."""

from optuna.distributions import CategoricalDistribution

from autotune.space.space import Space


def distributions(space: Space) -> dict[str, CategoricalDistribution]:
    """One categorical per axis that is really searched, `n/a` among its choices where the axis is conditional."""
    choices = {axis: space.used(axis) for axis in space.axes}
    return {axis: CategoricalDistribution(values) for axis, values in choices.items() if len(values) > 1}
