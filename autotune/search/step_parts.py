"""A predicted step as the posterior takes it: the shares of its parts, and what is uncertain about them together.

The widths are judgement, none is a fit.
"""

from collections.abc import Sequence

import numpy as np

from autotune.predict.roofline import TimePart
from autotune.predict.step import StepTimes
from autotune.search.posterior import Issued, Values

PRIOR_DEVIATIONS = (0.2, 0.3, 0.3)
"""Of the logarithms of compute, network and launch: kernels vary with clocks and versions, networks with topology and
neighbours, processors with their speed and the library's Python."""
PART_DEVIATION = 0.3
"""Of the logarithm of what one part of a step takes, by its own formula; what parts have in common, a slow network or
processor, is as uncertain as `PRIOR_DEVIATIONS` has it."""
NETWORK = (
    TimePart.TENSOR_PARALLEL,
    TimePart.PIPELINE_TRANSFER,
    TimePart.GRADIENT_REDUCTION,
    TimePart.PARAMETER_GATHER,
)
_BY_MICRO_BATCH = (
    TimePart.MATMUL,
    TimePart.ATTENTION,
    TimePart.ELEMENTWISE,
    TimePart.LOGITS,
    TimePart.ACCUMULATION,
    TimePart.RECOMPUTATION,
    TimePart.TENSOR_PARALLEL,
    TimePart.PIPELINE_TRANSFER,
)
"""What the device works on while the processor issues more of it."""


def step_columns(times: StepTimes) -> tuple[Values, Values, Issued | None]:
    """`Candidates.shares, unknowns, issued` of predicted steps.

    A pipeline's bubble is so many times a micro-batch, and so a part of whatever a micro-batch takes.
    """
    parts, whole = list(times.parts), times.step_seconds
    shares = np.stack([seconds / whole for seconds in times.parts.values()], axis=1)
    hides = np.array([part in _BY_MICRO_BATCH for part in parts])
    late, bubble = (parts.index(part) if part in parts else None for part in (TimePart.LAUNCH, TimePart.BUBBLE))
    if late is None or times.issue_seconds is None:
        return shares, step_unknowns(parts), None
    # Of a pipeline's stage one pass may wait while the other hides its own: what waits, waits.
    working = shares @ hides + shares[:, late]
    issued = np.where(shares[:, late] > 0, working, times.issue_seconds / whole)
    if bubble is not None:
        longer = 1 + shares[:, bubble] / working
        shares[:, hides] *= longer[:, None]
        shares[:, late] *= longer
        shares[:, bubble] = 0.0
        issued *= longer
    return shares, step_unknowns(parts), Issued(issued, late, hides)


def network_parts(parts: Sequence[TimePart]) -> list[int]:
    """Which parts of a step use the network between GPUs."""
    return [row for row, part in enumerate(parts) if part in NETWORK]


def step_unknowns(parts: Sequence[TimePart]) -> Values:
    """`Candidates.unknowns` of parts of a step: compute, network and launch, and each part by itself (K, 3 + K)."""
    common = np.zeros((len(parts), 3))
    for row, part in enumerate(parts):
        group = 1 if part in NETWORK else 2 if part is TimePart.LAUNCH else 0
        common[row, group] = PRIOR_DEVIATIONS[group] * (part is not TimePart.BUBBLE)
    return np.hstack([common, PART_DEVIATION * np.eye(len(parts))])
