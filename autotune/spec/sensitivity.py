"""`Sensitivity`: what one step of each axis away from a study's winner does, and what holds the winner back."""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from autotune.spec.config import Scalar


class Basis(StrEnum):
    """How a step is known."""

    MEASURED = "measured"
    """A trial ran it, once and briefly, as the winner was screened."""
    EXPECTED = "expected"
    """The posterior, after all trials."""
    PREDICTED = "predicted"
    """The plan alone: it surely does not fit, so that nothing was to be learnt."""
    ILLEGAL = "illegal"
    """It cannot run."""


class Constraint(StrEnum):
    """What keeps the winner from being faster."""

    MEMORY = "memory"
    """A step that memory forbids would be faster."""
    COMPUTE = "compute"
    COMMUNICATION = "communication"
    BUBBLE = "pipeline bubble"
    PROCESSOR = "processor"
    """It issues work more slowly than the GPU does it."""
    HOST_LINK = "host link"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The winner with one axis moved by one value."""

    axis: str
    value: Scalar
    basis: Basis
    ratio: float | None = None
    """Throughput / that of the winner's screening. Of what does not fit, what it would be if it did."""
    low: float | None = None
    """With `high` the interval that holds a measured ratio with a probability of 80 %; None where it was measured."""
    high: float | None = None
    device_used_bytes: int | None = None
    """Peak of the fullest rank; None where a trial ended before it was known."""
    fit_probability: float | None = None
    """0..1; None where it cannot run."""
    trial: int | None = None
    note: str | None = None
    """How the trial ended, if not well, or why the step is illegal."""

    @property
    def fits(self) -> bool:
        """More probably than not."""
        return self.fit_probability is not None and self.fit_probability >= 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Of one winner, after so many trials."""

    trial: int
    """The winner."""
    trials: int
    """That were finished when this was found."""
    steps: tuple[Step, ...]
    """By axis, in the order of the file."""
    device_used_bytes: int
    """Of the winner."""
    usable_bytes: int
    """Device memory less the headroom."""
    constraint: Constraint
    because: str
    """One sentence."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        steps = tuple(Step(**{**step, "basis": Basis(step["basis"])}) for step in fields["steps"])
        return cls(**{**fields, "steps": steps, "constraint": Constraint(fields["constraint"])})
