"""Optuna samplers by the name that `--sampler` takes."""

import warnings
from enum import StrEnum

import optuna

from autotune.predict.plan import Plan
from autotune.search.earlier import Earlier
from autotune.search.plan_sampler import PlanSampler
from autotune.study import Study

# `group` keeps the joint distribution of axes apart by the conditions under which they apply; Optuna 5 still calls it
# experimental, and warns.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class SamplerName(StrEnum):
    """What may be asked for."""

    PLAN = "plan"
    """Ours: every candidate scored by what is predicted and measured."""
    TPE = "tpe"
    GP = "gp"
    RANDOM = "random"


def build_sampler(
    name: SamplerName,
    seed: int,
    study: Study | None = None,
    plan: Plan | None = None,
    earlier: Earlier | None = None,
) -> optuna.samplers.BaseSampler:
    """The sampler of that name. Optuna's own read the memory constraint that `TuneSearch` sets; ours reads the study.

    Raises:
        ValueError: ours needs a study and its plan.
    """
    if name is SamplerName.PLAN:
        if study is None or plan is None:
            raise ValueError("sampler plan needs a study and its plan")
        return PlanSampler(study, plan, seed, earlier)
    if name is SamplerName.GP:
        return optuna.samplers.GPSampler(seed=seed)
    if name is SamplerName.RANDOM:
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
