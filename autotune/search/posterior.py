"""The residuals of all candidates given what was observed: a bias, parts of the step, effects of axes, a local part.

b is a bias common to all; s_k how much longer than predicted one part of every step takes, by its own formula and by
what parts share, a slow network for one; m_j what one axis alone does that the prediction does not know; and l what
only a combination does. b and s_k are normal, m_j and l Gaussian processes with squared-exponential kernels. Their
widths are given; marginal likelihood, with a log-normal prior on every multiple, chooses how many times as wide
they are (Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, chapters 2.2 and 5.4). A throughput that
all others contradict is doubted by as much as they contradict it.

What ran out of memory needed at least the capacity, what was stopped early is at most as fast as it could still have
become: one-sided observations, by expectation propagation (the same, section 3.6).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import log_ndtr, ndtr

Values = NDArray[np.float64]
Floats = NDArray[np.float32] | NDArray[np.float64]
Indices = NDArray[np.int64]

LENGTH = 2.0
"""In units of a feature, over which errors are alike; with features in doublings, a factor of four."""
MULTIPLES = (0.5, 1.0, 2.0, 4.0)
NOISE_MULTIPLES = (1.0, 3.0)
MULTIPLE_DEVIATION = 0.7
"""Of the logarithm of a multiple: a width is known to about a factor of two."""

_BINS = 16
"""Distinct values of a feature that axes' effects tell apart."""
_FIT_ROWS = 64
"""Observations that marginal likelihood looks at."""
_SWEEPS = 8
_DAMPING = 0.8
_BOUND_ROWS = 32
"""Observations that bound a variance from above: the fewer are known, the larger it is."""


@dataclass(frozen=True, slots=True)
class Issued:
    """What a processor issues while a device works: of the two the longer counts, and one part is by how much."""

    shares: Values
    """(N,) of the predicted step that the processor needs."""
    late: int
    """The part that is what the device waits for."""
    hides: NDArray[np.bool_]
    """(K,) the parts that the device works on meanwhile."""


class Model:
    """A prior over the residuals of all candidates: a bias, parts of the step, effects of axes, and a local part."""

    def __init__(
        self, bias: Values, shares: Values, unknowns: Values, axes: Values, local: Values, issued: Issued | None = None
    ) -> None:
        self.bias = bias[:, None].astype(np.float32)
        self.shares = shares.astype(np.float32)
        self.axes = axes.astype(np.float32)
        self.local = local.astype(np.float32)
        self.unknowns = unknowns.astype(np.float32)
        self.issued = issued

    def linear(self, rows: Indices | slice, belief: "Belief") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Offset (B,) and columns (B, P), such that a residual is the offset + columns @ standard normal unknowns.

        The step takes sum_k share_k·exp(s_k); this is its tangent at the scales, as in an extended Kalman filter.
        """
        scales = belief.scales
        bias, axes = self.bias[rows], self.axes[rows]
        if not len(scales):
            return np.zeros(len(bias), np.float32), np.hstack([bias, axes])
        scaled = self.shares[rows] * np.exp(scales).astype(np.float32)
        growths = scaled if self.issued is None or belief.adds_up else self._wait(self.issued, rows, scaled, scales)
        total = scaled.sum(axis=1)
        slopes = -growths / total[:, None]
        offset = -np.log(total) - slopes @ scales.astype(np.float32)
        return offset, np.hstack([bias, slopes @ self.unknowns, axes])

    def _wait(
        self, issued: Issued, rows: Indices | slice, scaled: NDArray[np.float32], scales: Values
    ) -> NDArray[np.float32]:
        """Set in `scaled` (B, K) what the device waits for its processor; by how much the step grows with each scale.

        Which of the two is late is as uncertain as how fast the processor is: the step grows with what either takes as
        probably as it is the later one.
        """
        needed = issued.shares[rows].astype(np.float32) * np.exp(np.float32(scales[issued.late]))
        busy = scaled @ issued.hides.astype(np.float32)
        scaled[:, issued.late] = np.maximum(needed - busy, 0)
        deviation = float(np.linalg.norm(self.unknowns[issued.late]))
        waits = ndtr(np.log(np.maximum(needed, 1e-12) / np.maximum(busy, 1e-12)) / deviation).astype(np.float32)
        growths = scaled * (1 - waits[:, None] * issued.hides)
        growths[:, issued.late] = waits * needed
        return np.asarray(growths, np.float32)

    def condition(
        self,
        evidence: "Evidence",
        correlation: Values,
        rounds: int,
        own: NDArray[np.bool_] | None = None,
        *,
        averaged: bool = False,
    ) -> "Posterior":
        """What M observations say.

        Args:
            evidence: the observations.
            correlation: of their local parts (M, M).
            rounds: of choosing the widths, the tangent, and what to doubt.
            own: (M,) which of them say how wide the widths are; all without it. Those of other studies say how far off
                predictions were there, and not how far off they may be here.
            averaged: how uncertain widths are counts in the deviations, which few observations would leave too small,
                and of device and processor the later one makes the step.
        """
        at, values = evidence.at, evidence.values
        belief = Belief(np.ones(4), np.zeros(self.shares.shape[1]), np.zeros(len(at)))
        local = self.local[at].astype(float)
        whole = correlation * np.outer(local, local)
        exact = np.flatnonzero((evidence.sides == 0) & (True if own is None else own))
        sample = exact[np.unique(np.linspace(0, len(exact) - 1, _FIT_ROWS).astype(int))] if len(exact) else exact
        inside = np.ix_(sample, sample)
        for step in range(rounds if (evidence.sides == 0).any() else 0):
            if step:
                posterior = Posterior(self, evidence, correlation, belief)
                belief = replace(belief, scales=posterior.scales(), doubt=posterior.doubt(own), adds_up=not averaged)
            if not len(sample):
                continue
            offset, columns = (found.astype(float) for found in self.linear(at, belief))
            common, axes = np.split(columns, [1 + self.unknowns.shape[1]], axis=1)
            parts = [(common @ common.T)[inside], (axes @ axes.T)[inside], whole[inside]]
            deviations = evidence.deviations[sample]
            multiples = _fit(
                parts,
                (values - offset)[sample],
                deviations,
                belief.doubt[sample],
                belief.multiples,
                averaged=averaged,
            )
            belief = replace(belief, multiples=multiples)
        return Posterior(self, evidence, correlation, belief)


@dataclass(frozen=True, slots=True)
class Evidence:
    """M observations of one residual."""

    at: Indices
    """The candidates (M,)."""
    values: Values
    """The residuals (M,), or their bounds."""
    sides: Indices
    """0 an exact residual, 1 at least so much, -1 at most (M,)."""
    deviations: Values
    """Noise (M,)."""

    @classmethod
    def of(cls, rows: Sequence[tuple[int, float, int, float]]) -> Self:
        """Rows of these four."""
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        at, values, sides, deviations = columns
        return cls(np.array(at, np.int64), np.array(values, float), np.array(sides, np.int64), np.array(deviations))

    def __getitem__(self, kept: Indices) -> "Evidence":
        return Evidence(self.at[kept], self.values[kept], self.sides[kept], self.deviations[kept])

    def __add__(self, more: "Evidence") -> "Evidence":
        pairs = ((getattr(self, field.name), getattr(more, field.name)) for field in fields(self))
        return Evidence(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True, slots=True)
class Belief:
    """What a posterior is conditioned under."""

    multiples: Values
    """Of the widths of common unknowns, axes, local part and noise."""
    scales: Values
    """Logarithms, of what the parts of a step really take (K,)."""
    doubt: Values
    """Variance of each observation beyond its noise (M,)."""
    adds_up: bool = True
    """What is late adds to the rest of a step whatever that takes. A tangent sees nothing of a part that something else
    hides until it has grown, so that a network ten times slower than predicted is found this way."""


class Posterior:
    """Mean and variance of a residual at any candidate."""

    def __init__(self, model: Model, evidence: "Evidence", correlation: Values, belief: "Belief") -> None:
        at, sides = evidence.at, evidence.sides
        common, axes, local, noise = belief.multiples
        split = 1 + model.unknowns.shape[1]
        count = split + model.axes.shape[1]
        self._model, self._at, self.belief = model, at, belief
        self._scale = np.where(np.arange(count) < split, common, axes).astype(np.float32) ** 2
        self._multiple = np.float32(local**2)
        offset, columns = model.linear(at, belief)
        self._columns = columns
        wide, near = columns.astype(float), model.local[at].astype(float)
        covariance = (wide * self._scale) @ wide.T + local**2 * np.outer(near, near) * correlation
        self._noise = (noise * evidence.deviations) ** 2
        precision, shift = _sites(covariance, evidence.values - offset, sides, self._noise + belief.doubt)
        root = np.sqrt(precision)
        factor = np.linalg.cholesky(np.eye(len(at)) + root[:, None] * covariance * root)
        inner = _solve(factor, _solve(factor, root * (covariance @ shift)), transposed=True)
        weights = shift - root * inner
        self._exact, self._precision, self._weights = sides == 0, precision, weights
        self._root, self._factor = root, factor
        self._linear_weights = (self._scale * (wide.T @ weights)).astype(np.float32)
        self.local_weights = self._multiple * near * weights
        self._covariance = covariance

    def scales(self) -> Values:
        """Logarithms of what the parts of a step take, after the observations (K,)."""
        unknowns = self._model.unknowns
        found = unknowns @ self._linear_weights[1 : 1 + unknowns.shape[1]].astype(float)
        return np.asarray(np.clip(found, self.belief.scales - 1, self.belief.scales + 1))

    def doubt(self, own: NDArray[np.bool_] | None = None) -> Values:
        """By how much each exact observation is contradicted: what it deviates by from what all others say of it,
        squared, beyond twice the deviation that was to be expected. One sick node must not move its neighbours.
        Of two it could not be said which contradicts the other. Other studies' alone (not `own`) contradict nothing
        that was measured here.
        """
        own = np.ones(len(self._exact), bool) if own is None else own
        if self._exact.sum() < 3:
            return np.zeros(len(self._exact))
        doubted = self._exact & (~own | ((self._exact & own).sum() >= 3))
        inverse = _solve(self._factor, np.diag(self._root))
        alone = np.maximum((inverse**2).sum(axis=0), 1e-12)
        expected = 1 / alone - 1 / self._precision + self._noise
        return np.where(doubted, np.maximum((self._weights / alone) ** 2 - 4 * expected, 0), 0.0)

    @cached_property
    def _few(self) -> tuple[Indices, NDArray[np.float32]]:
        """Some observations, and what their covariances are multiplied by, to see how much they explain."""
        chosen = _pivots(self._covariance, self._precision, _BOUND_ROWS)
        root = self._root[chosen]
        inside = root[:, None] * self._covariance[np.ix_(chosen, chosen)] * root
        factor = np.linalg.cholesky(np.eye(len(chosen)) + inside)
        return chosen, _solve(factor, np.diag(root)).astype(np.float32)

    def at(
        self, rows: Indices | slice, correlation: Floats, where: Indices, local: Floats, *, bound: bool
    ) -> tuple[Values, Values]:
        """Mean and deviation of candidates (B,); of the deviation a bound from above, with few observations.

        Args:
            rows: the candidates.
            correlation: of their local parts with those of other candidates.
            where: the observations' columns in it (M,).
            local: what the local parts of the observations say of the candidates' (B,).
            bound: instead of the deviation itself.
        """
        offset, columns = self._model.linear(rows, self.belief)
        near = self._model.local[rows]
        mean = offset + columns @ self._linear_weights + near * local
        prior = columns**2 @ self._scale + self._multiple * near**2
        chosen, whitened = self._few if bound else (np.arange(len(where)), None)
        known = (columns * self._scale) @ self._columns[chosen].T
        known += (self._multiple * near)[:, None] * self._model.local[self._at[chosen]] * correlation[:, where[chosen]]
        if whitened is not None:
            known = known @ whitened.T
            variance = (prior - np.einsum("ij,ij->i", known, known)) * 1.001 + 1e-5  # single precision
        else:
            explained = _solve(self._factor, known.astype(float).T * self._root[:, None])
            variance = prior - (explained**2).sum(axis=0)
        return np.asarray(mean, float), np.sqrt(np.maximum(variance.astype(float), 1e-8))


def axis_columns(features: Values) -> Values:
    """Columns whose products are the sum of one squared-exponential kernel an axis, all of variance 1: (N, P)."""
    found = [np.zeros((len(features), 0))]
    for axis in features.T:
        values, rows = np.unique(axis, return_inverse=True)
        if len(values) > _BINS:
            values = np.unique(np.quantile(axis, np.linspace(0, 1, _BINS)))
            rows = np.abs(axis[:, None] - values).argmin(axis=1)
        kernel = np.exp(-((values[:, None] - values) ** 2) / (2 * LENGTH**2))
        sizes, directions = np.linalg.eigh(kernel)
        kept = sizes > 1e-3 * sizes[-1]
        found.append((directions[:, kept] * np.sqrt(sizes[kept]))[rows])
    return np.hstack(found)


def _fit(
    parts: Sequence[Values], values: Values, noise: Values, doubt: Values, start: Values, *, averaged: bool
) -> Values:
    """The most probable multiples of the widths of three parts and of the noise, one after the other.

    Args:
        parts: covariances of M observations at multiples of 1.
        values: residuals (M,).
        noise: deviations (M,).
        doubt: variance of each observation beyond the noise (M,).
        start: multiples to begin at (4,).
        averaged: instead, roots of the mean variances, each choice as probable as it is.
    """
    found = start.copy()
    for index in (0, 2, 1, 3):
        choices = np.array(NOISE_MULTIPLES if index == 3 else MULTIPLES)
        grid = np.tile(found, (len(choices), 1))
        grid[:, index] = choices
        stack = np.tensordot(grid[:, :3] ** 2, np.stack(parts), axes=1)
        diagonal = np.arange(len(values))
        stack[:, diagonal, diagonal] += (grid[:, 3:] * noise) ** 2 + doubt
        factors = np.linalg.cholesky(stack)
        score = -0.5 * (np.log(grid) ** 2).sum(axis=1) / MULTIPLE_DEVIATION**2
        score -= np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)
        score -= 0.5 * np.array([(_solve(factor, values) ** 2).sum() for factor in factors])
        if averaged:
            weights = np.exp(score - score.max())
            found[index] = np.sqrt(weights @ grid[:, index] ** 2 / weights.sum())
        else:
            found = grid[int(np.argmax(score))]
    return found


def _sites(covariance: Values, values: Values, sides: Indices, noise: Values) -> tuple[Values, Values]:
    """Precision and precision x mean of the Gaussian that stands for each observation (M,); noise is a variance."""
    precision = np.where(sides == 0, 1 / noise, 1e-8)
    shift = np.where(sides == 0, values / noise, 0.0)
    bounded = np.flatnonzero(sides)
    if not len(bounded):
        return precision, shift
    side, bound = sides[bounded].astype(float), values[bounded]
    for _ in range(_SWEEPS):
        root = np.sqrt(precision)
        factor = np.linalg.cholesky(np.eye(len(values)) + root[:, None] * covariance * root)
        half = _solve(factor, root[:, None] * covariance)
        mean = (covariance @ shift - half.T @ (half @ shift))[bounded]
        variance = np.maximum(np.diag(covariance)[bounded] - (half[:, bounded] ** 2).sum(axis=0), 1e-12)
        # The cavity: what all other observations say.
        left = np.maximum(1 / variance - precision[bounded], 1e-8)
        cavity, spread = (mean / variance - shift[bounded]) / left, 1 / left
        total = np.sqrt(spread + noise[bounded])
        z = side * (cavity - bound) / total
        ratio = np.exp(-(z**2) / 2 - np.log(2 * np.pi) / 2 - log_ndtr(z))
        tilted = cavity + side * spread * ratio / total
        narrowed = np.maximum(spread - spread**2 * ratio * (z + ratio) / total**2, 1e-12)
        new_precision = np.maximum(1 / narrowed - left, 1e-8)
        new_shift = tilted * (new_precision + left) - cavity * left
        precision[bounded] += _DAMPING * (new_precision - precision[bounded])
        shift[bounded] += _DAMPING * (new_shift - shift[bounded])
    return precision, shift


def _pivots(covariance: Values, precision: Values, count: int) -> Indices:
    """Observations that explain most of the others, by pivoted Cholesky decomposition."""
    if len(covariance) <= count:
        return np.arange(len(covariance))
    left = np.diag(covariance).copy()
    rows = np.zeros((count, len(covariance)))
    chosen = np.zeros(count, np.int64)
    for step in range(count):
        left[chosen[:step]] = -1.0
        pivot = int(np.argmax(left))
        row = covariance[pivot] - rows[:step, pivot] @ rows[:step]
        rows[step] = row / np.sqrt(max(left[pivot] + 1 / precision[pivot], 1e-12))
        left = np.maximum(left - rows[step] ** 2, 0.0)
        chosen[step] = pivot
    return chosen


def _solve(factor: NDArray[np.floating[Any]], right: Values, *, transposed: bool = False) -> Values:
    return np.asarray(solve_triangular(factor, right, lower=True, trans=int(transposed), check_finite=False))
