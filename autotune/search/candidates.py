"""What the sampler chooses from, in columns, and what it is told of finished trials."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from autotune.search.posterior import Indices, Issued, Values

MEMORY_NOISE = 0.02
"""Of a measured peak: the allocator's rounding."""

_COLUMNS = ("features", "throughput", "shares", "peak_bytes", "peak_deviation", "cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """N candidates in columns."""

    features: Values
    """(N, D). One unit is as far as a doubling of a size, or one choice from another."""
    throughput: Values
    """(N,) predicted, in any unit; all equal where nothing is predicted."""
    shares: Values
    """(N, K) of the parts of the predicted step; K = 0 where it has none."""
    unknowns: Values
    """(K, U): by how much the logarithm of what a part takes moves for one standard deviation of each unknown."""
    issued: Issued | None = None
    """None where all parts add up as they are."""
    peak_bytes: Values
    """(N,) predicted."""
    peak_deviation: Values
    """(N,) standard deviation of the peak, as a ratio of it."""
    capacity_bytes: float
    """What a candidate may use."""
    cost: Values
    """(N,) of a trial, in any unit."""
    offered: int | None = None
    """The first so many may be proposed, None: all. The others are configs that earlier studies ran on equal hardware,
    perhaps of another model, length or number of GPUs: what was observed of them teaches, but less surely."""

    def only(self, rows: Indices) -> "Candidates":
        """Some of them."""
        columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in _COLUMNS}
        issued = self.issued and replace(self.issued, shares=self.issued.shares[rows])
        return replace(self, **columns, issued=issued)

    def before(self, earlier: "Candidates", network: Sequence[int], elsewhere: NDArray[np.bool_]) -> "Candidates":
        """With configs of earlier studies behind them, which are not offered.

        Args:
            earlier: M configs.
            network: which of the K parts are of the network.
            elsewhere: (M,) those that ran on another one, inside a node or between nodes where these do not: how slow
                it is says nothing here, so that its parts are parts of their own.
        """
        network = list(network)
        own = np.hstack([self.shares, np.zeros((len(self.shares), len(network)))])
        moved = earlier.shares[:, network] * elsewhere[:, None]
        theirs = earlier.shares.copy()
        theirs[:, network] -= moved
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(earlier, name)]) for name in _COLUMNS
        }
        joined["shares"] = np.concatenate([own, np.hstack([theirs, moved])])
        unknowns, issued = block_diag(self.unknowns, self.unknowns[network]), None
        if self.issued is not None and earlier.issued is not None:
            needed = np.concatenate([self.issued.shares, earlier.issued.shares])
            hides = np.concatenate([self.issued.hides, self.issued.hides[network]])
            issued = Issued(needed, self.issued.late, hides)
        return replace(self, **joined, unknowns=unknowns, issued=issued, offered=len(self.throughput))


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a finished trial taught. One that taught nothing is left out."""

    candidate: int
    throughput: float | None = None
    """Measured; in the unit of the predictions."""
    at_most: float | None = None
    """It cannot be faster: a trial that was stopped."""
    peak_bytes: float | None = None
    """Measured; more than the capacity makes a throughput ineligible."""
    peak_deviation: float = MEMORY_NOISE
    """Of the peak as a measure of what is needed, as a ratio. Of reserved bytes it is large: an allocator keeps, while
    there is room, what it gives back where there is none."""
    ran_out: bool = False
    """It needed at least the capacity."""
    failed: bool = False
    """For another reason than memory."""
