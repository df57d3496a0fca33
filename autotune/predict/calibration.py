"""Predicted times sharpened by measured ones: the most probable of three scales.

    log measured_i = log predicted_i(compute, network, launch) + error_i

Scales are log-normal around 1: a prior's width says how far a nominal constant may be off on a cluster that nobody
measured, so that a few measurements move what they tell about and leave the rest where it was. Errors are normal, with
the longer tails of Huber's function (Annals of Mathematical Statistics 35, 1964), for the odd measurement.
"""

from collections.abc import Callable

import numpy as np

from autotune.predict.kernels import Values
from autotune.predict.roofline import Scales

PRIOR_DEVIATIONS = np.array([0.2, 0.3, 0.3])
"""Of the logarithms of compute, network and launch. Judgement: kernels vary with clocks and versions, networks with
topology and neighbours, processors with their speed and the library's Python."""
ERROR_DEVIATION = 0.1
"""Of a measured step, as a ratio: what repeats differ by, and what the formulas leave out. Judgement."""
_HUBER = 1.345
"""In deviations, from where an error counts linearly; the usual choice."""
_STEPS = 10
_LONGEST_STEP = 0.3
_DELTA = 1e-3


def fit_scales(predict: Callable[[Scales], Values], measured: Values) -> Scales:
    """Scales under which predictions meet measurements, and priors, best.

    Gauss-Newton on logarithms with numeric derivatives, errors reweighted in each step.

    Args:
        predict: step seconds (N,) of the measured candidates.
        measured: their step seconds (N,).
    """
    logs = np.zeros(3)
    prior = np.diag(PRIOR_DEVIATIONS**-2)

    def errors(at: Values) -> Values:
        compute, network, launch = np.exp(at)
        found: Values = np.log(measured / predict(Scales(compute=compute, network=network, launch=launch)))
        return found / ERROR_DEVIATION

    for _ in range(_STEPS):
        here = errors(logs)
        slopes = np.stack([(here - errors(logs + _DELTA * one)) / _DELTA for one in np.eye(3)], axis=1)
        weighted = slopes.T * np.minimum(1.0, _HUBER / np.maximum(np.abs(here), 1e-9))
        step = np.linalg.solve(weighted @ slopes + prior, weighted @ here - prior @ logs)
        logs = logs + np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)  # the launch floor bends
    compute, network, launch = (float(scale) for scale in np.exp(logs))
    return Scales(compute=compute, network=network, launch=launch)
