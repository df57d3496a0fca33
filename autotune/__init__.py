"""Autotune finds the settings that make a large language model train fast without running out of memory.

It searches precision, ZeRO stage, offload, activation checkpointing, batch and sequence length by running short, real
trials on the cluster under Ray Tune and Optuna, keeps every measurement in a database, and exports files that the
tools of the field take as they are.

A training script of your own imports this for `report_step` or `TrainerCallback`, which do nothing outside a trial
(docs/own-script.md).
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.script.callback import TrainerCallback as TrainerCallback
    from autotune.script.session import report_step as report_step

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The script's names, loaded when they are asked for: everybody else imports this, too."""
    if name == "report_step":
        from autotune.script.session import report_step

        return report_step
    if name == "TrainerCallback":
        from autotune.script.callback import TrainerCallback

        return TrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "AUTOTUNE_SCRIPT" in os.environ:  # set by `autotune.trial.script` for the processes of a user's script alone
    from autotune.script.session import begin

    begin()
