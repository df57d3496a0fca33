"""What a candidate is expected to add to the best throughput so far, or to the best for each amount of memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.special import erfcx, ndtr

from autotune.search.candidates import Observed
from autotune.search.posterior import Values


@dataclass(frozen=True, slots=True)
class Front:
    """What was reached with at most so much memory: K stretches of memory, in each the best throughput so far.

    Its volume is the area under that staircase, memory as a ratio of the capacity. What a candidate is expected to add
    to it, with a peak that is taken to be known (Emmerich et al., "Hypervolume-based expected improvement", 2011):

        sum_k max(0, end_k - max(start_k, peak)) / capacity x E[max(throughput - level_k, 0)]
    """

    starts: Values
    """Bytes (K,)."""
    ends: Values
    levels: Values
    """Throughput (K,); 0 where nothing was measured that needs so little."""
    capacity_bytes: float

    @classmethod
    def of(cls, measured: Sequence[Observed], capacity_bytes: float) -> Self:
        """The staircase of what was measured and fits."""
        points = [(one.peak_bytes, one.throughput) for one in measured if one.peak_bytes is not None]
        steps = [(0.0, 0.0)]
        for peak, throughput in sorted((peak, throughput or 0.0) for peak, throughput in points):
            if peak <= capacity_bytes and throughput > steps[-1][1]:
                steps.append((peak, throughput))
        starts, levels = np.array(steps).T
        return cls(starts, np.append(starts[1:], capacity_bytes), levels, capacity_bytes)

    @property
    def volume(self) -> float:
        """In units of throughput."""
        return float((self.ends - self.starts) @ self.levels) / self.capacity_bytes

    def log_gain(self, logs: Values, deviations: Values, peaks: Values) -> Values:
        """Logarithm of the expected gain in volume, of candidates (B,) with these log throughputs and peak bytes."""
        found = np.full(len(logs), -np.inf)
        for start, end, level in zip(self.starts, self.ends, self.levels, strict=True):
            width = np.maximum(end - np.maximum(start, peaks), 0.0) / self.capacity_bytes
            with np.errstate(divide="ignore"):
                share = np.log(width)
            found = np.logaddexp(found, share + log_improvement(logs, deviations, np.log(level) if level else None))
        return found


def log_improvement(logs: Values, deviations: Values, best: float | None) -> Values:
    """log(best x E[max(log throughput - log best, 0)]); log E[throughput] where there is no best.

    With z = (mean - best) / deviation the expectation is deviation x (pdf(z) + z·cdf(z)); below z = -1 by erfcx, which
    loses no digits (Ament et al., arXiv:2310.20708, equation 9).
    """
    if best is None:
        return logs + deviations**2 / 2
    z = (logs - best) / deviations
    low = np.clip(z, -1e6, -1.0)
    ratio = np.sqrt(np.pi / 2) * -low * erfcx(-low / np.sqrt(2))
    # Beyond -1e3, 1 - ratio is its asymptote 1/z².
    tail = np.where(low > -1e3, np.log1p(-np.minimum(ratio, 1 - 1e-15)), -2 * np.log(-low))
    far = -(low**2) / 2 - np.log(2 * np.pi) / 2 + tail
    high = np.maximum(z, -1.0)
    near = np.log(np.exp(-(high**2) / 2) / np.sqrt(2 * np.pi) + high * ndtr(high))
    return np.asarray(best + np.log(deviations) + np.where(z < -1, far, near))
