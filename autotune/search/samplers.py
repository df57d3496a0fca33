"""Optuna samplers by the name that `--sampler` takes."""

import warnings
from enum import StrEnum

import optuna

# `group` keeps the joint distribution of axes apart by the conditions under which they apply; Optuna 5 still calls it
# experimental, and warns.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class SamplerName(StrEnum):
    """What may be asked for."""

    TPE = "tpe"
    GP = "gp"
    RANDOM = "random"


def build_sampler(name: SamplerName, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of that name. All of them read the memory constraint that `TuneSearch` sets."""
    if name is SamplerName.GP:
        return optuna.samplers.GPSampler(seed=seed)
    if name is SamplerName.RANDOM:
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
