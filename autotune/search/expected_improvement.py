"""Which candidate to run next: expected improvement under a joint posterior over throughput and memory.

Predictions are the prior, measurements correct them. For every candidate i, with x_i its features,

    log throughput_i = log predicted_i + b + sum_k a_ik·d_k + sum_j m_j(x_ij) + l(x_i) + noise
    log peak_i       = log predicted peak_i + the same without the second sum, as wide as the memory prediction says

b is a bias common to all, d_k standard normal unknowns to which the prediction is sensitive by a_ik (a share of the
step times how far that part's formula may be off), m_j what one axis alone does that the prediction does not know, and
l what only a combination does; m_j and l are Gaussian processes with squared-exponential kernels. Their widths are
priors below; marginal likelihood, with a log-normal prior on every multiple, chooses how many times as wide they are
(Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, chapters 2.2 and 5.4).

What ran out of memory needed at least the capacity, what was stopped early is at most as fast as it could still have
become: one-sided observations, by expectation propagation (the same, section 3.6). What failed for other reasons makes
its neighbours suspect: a Beta prior, in which a neighbour counts by its kernel.

    score = expected improvement x P(fits) x P(runs) / cost

with improvement as a ratio of the best so far (logarithmic, so that scores stay comparable where they are tiny: Ament et
al., arXiv:2310.20708), and with the throughput itself while nothing was measured. Running trials are taken to come out
as expected (Ginsbourger et al., "Kriging is well-suited to parallelize optimization", 2010), their success to be as
probable as it is.

Left out: noise of the best measurement so far (confirmation is for that), and lookahead over more than one trial.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular  # type: ignore[import-untyped]
from scipy.special import erfcx, log_ndtr, ndtr  # type: ignore[import-untyped]

Values = NDArray[np.float64]
Floats = NDArray[np.float32] | NDArray[np.float64]
Indices = NDArray[np.int64]

# Widths of the prior. All are judgement, made before any search was run with them.
BIAS_DEVIATION = 0.3
"""Of the logarithm of all throughputs together: `predict.calibration` has 0.2 to 0.3 for a nominal constant."""
AXIS_DEVIATION = 0.1
"""Of what one axis does beyond the prediction: what formulas leave out (`predict.calibration.ERROR_DEVIATION`)."""
LOCAL_DEVIATION = 0.1
"""Of what a combination does: the same."""
NOISE_DEVIATION = 0.05
"""Of a measured throughput: short trials on one cluster repeat within a few percent."""
MEMORY_SHARES = (0.5, 0.25, 0.25)
"""Of the variance of a memory prediction: bias, axes together, combinations. Errors of a formula are mostly common."""
MEMORY_NOISE = 0.02
"""Of a measured peak: the allocator's rounding."""
LENGTH = 2.0
"""In units of a feature, over which errors are alike; with features in doublings, a factor of four."""
FAILURE_RATE, FAILURE_STRENGTH = 0.05, 1.0
"""Of trials that fail for no known reason; and after how many trials' worth of doubt neighbours outweigh it."""
MULTIPLES = (0.5, 1.0, 2.0, 4.0)
NOISE_MULTIPLES = (1.0, 3.0)
MULTIPLE_DEVIATION = 0.7
"""Of the logarithm of a multiple: a width is known to about a factor of two."""
LEAST_FIT_PROBABILITY = 0.01
"""What is less likely to fit is not worth a launch."""

_BINS = 16
"""Distinct values of a feature that axes' effects tell apart."""
_FIT_ROWS = 96
"""Observations that marginal likelihood looks at."""
_SWEEPS = 8
_DAMPING = 0.8
_NEAR_ROWS = 192
"""Observations of memory that are kept: those next to the capacity, which decide."""
_BOUND_ROWS = 48
"""Observations that bound a variance from above: the fewer are known, the larger it is."""
_CHUNK = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """N candidates in columns."""

    features: Values
    """(N, D). One unit is as far as a doubling of a size, or one choice from another."""
    throughput: Values
    """(N,) predicted, in any unit; all equal where nothing is predicted."""
    sensitivities: Values
    """(N, K): how far the logarithm of the throughput moves for one standard deviation of each unknown."""
    peak_bytes: Values
    """(N,) predicted."""
    peak_deviation: Values
    """(N,) standard deviation of the peak, as a ratio of it."""
    capacity_bytes: float
    """What a candidate may use."""
    cost: Values
    """(N,) of a trial, in any unit."""


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
    ran_out: bool = False
    """It needed at least the capacity."""
    failed: bool = False
    """For another reason than memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The next candidate, and why."""

    candidate: int
    predicted_throughput: float
    """Before anything was measured."""
    throughput: float
    """Median of the posterior."""
    throughput_deviation: float
    """Of its logarithm: about the ratio by which it may be off."""
    fit_probability: float
    run_probability: float
    """That it does not fail for another reason."""
    best_throughput: float | None
    """Measured so far, of what fits."""
    expected_gain: float | None
    """A ratio of the best throughput, failures counted as none; None while nothing was measured."""
    cost: float
    score: float
    """Logarithm; the largest of all candidates."""
    rank_by_throughput: int
    """Among the candidates that were not yet launched; 1 is the fastest."""


class ExpectedImprovement:
    """Proposes candidates. Holds no state but the candidates: what was observed is given each time."""

    def __init__(self, candidates: Candidates) -> None:
        self._given = candidates
        self._features = np.asarray(candidates.features, np.float32)
        axes = _axis_columns(candidates.features)
        count = len(candidates.throughput)
        bias = np.ones((count, 1))
        self._time = _Prior(
            np.hstack([BIAS_DEVIATION * bias, candidates.sensitivities]),
            AXIS_DEVIATION * axes,
            np.full(count, LOCAL_DEVIATION),
            NOISE_DEVIATION,
        )
        width = candidates.peak_deviation
        common, by_axis, local = np.sqrt(MEMORY_SHARES)
        by_axis /= np.sqrt(max(candidates.features.shape[1], 1))
        self._memory = _Prior(
            common * width[:, None] * bias, by_axis * width[:, None] * axes, local * width, MEMORY_NOISE
        )
        self._log_throughput = np.log(candidates.throughput)
        self._log_room = np.log(candidates.capacity_bytes / candidates.peak_bytes)
        self._log_cost = np.log(candidates.cost)

    def propose(self, observed: Sequence[Observed], pending: Collection[int] = ()) -> Proposal | None:
        """The best candidate that was neither observed nor is running; None when none is left that may fit.

        Args:
            observed: of finished trials.
            pending: candidates of running trials.
        """
        view = _View(self, observed, sorted(set(pending)))
        return view.best()

    def _correlation(self, rows: Indices | slice, at: Indices) -> NDArray[np.float32]:
        """exp(-|x - y|² / (2·LENGTH²)) of rows (B,) and observations (M,), as (B, M)."""
        left, right = self._features[rows] / LENGTH, self._features[at] / LENGTH
        found = left @ right.T
        found -= 0.5 * (left**2).sum(axis=1)[:, None]
        found -= 0.5 * (right**2).sum(axis=1)[None]
        return np.exp(np.minimum(found, 0, out=found), out=found)


class _Prior:
    """A Gaussian process over the candidates: columns of linear effects, and a local part."""

    def __init__(self, common: Values, axes: Values, local: Values, noise: float) -> None:
        self.split = common.shape[1]
        self.columns = np.hstack([common, axes]).astype(np.float32)
        self.local = local.astype(np.float32)
        self.noise = noise

    def condition(self, at: Indices, correlation: Values, values: Values, sides: Indices) -> "_Posterior":
        """What M observations say.

        Args:
            at: candidates observed (M,).
            correlation: of their local parts (M, M).
            values: residuals (M,), or their bounds.
            sides: 0 an exact residual, 1 at least so much, -1 at most (M,).
        """
        columns, local = self.columns[at].astype(float), self.local[at].astype(float)
        parts = (
            columns[:, : self.split] @ columns[:, : self.split].T,
            columns[:, self.split :] @ columns[:, self.split :].T,
            correlation * np.outer(local, local),
        )
        exact = np.flatnonzero(sides == 0)
        sample = exact[np.unique(np.linspace(0, len(exact) - 1, _FIT_ROWS).astype(int))] if len(exact) else exact
        multiples = _fit([part[np.ix_(sample, sample)] for part in parts], values[sample], self.noise)
        common, axes, whole, noise = multiples
        covariance = common**2 * parts[0] + axes**2 * parts[1] + whole**2 * parts[2]
        return _Posterior(self, at, covariance, values, sides, (common, axes, whole), noise * self.noise)


class _Posterior:
    """Mean and variance of a residual at any candidate."""

    def __init__(
        self,
        prior: _Prior,
        at: Indices,
        covariance: Values,
        values: Values,
        sides: Indices,
        multiples: tuple[float, float, float],
        noise: float,
    ) -> None:
        common, axes, local = multiples
        scale = np.where(np.arange(prior.columns.shape[1]) < prior.split, common, axes).astype(np.float32)
        self._columns, self._local = prior.columns, prior.local
        self._scale, self._multiple = scale**2, local**2
        precision, shift = _sites(covariance, values, sides, noise)
        root = np.sqrt(precision)
        factor = np.linalg.cholesky(np.eye(len(at)) + root[:, None] * covariance * root)
        inner = root * _solve(factor, _solve(factor, root * (covariance @ shift)), transposed=True)
        weights = shift - inner
        self._at, self._root, self._factor = at, root, factor
        observed = prior.columns[at].astype(float)
        self.linear_weights = (self._scale * (observed.T @ weights)).astype(np.float32)
        self.local_weights = self._multiple * prior.local[at] * weights
        chosen = _pivots(covariance, precision, _BOUND_ROWS)
        self._chosen = chosen
        inside = covariance[np.ix_(chosen, chosen)]
        few = np.linalg.cholesky(np.eye(len(chosen)) + root[chosen, None] * inside * root[chosen])
        whitened = _solve(few, np.diag(root[chosen]))
        self._whitened = whitened.astype(np.float32)

    def mean(self, rows: slice | Indices, local: Floats) -> Values:
        """Of candidates (B,), from the local part of their correlations with the observations @ `local_weights`."""
        return np.asarray(self._columns[rows] @ self.linear_weights + self._local[rows] * local, float)

    def _prior_variance(self, rows: slice | Indices) -> Values:
        return np.asarray(self._columns[rows] ** 2 @ self._scale + self._multiple * self._local[rows] ** 2, float)

    def _covariance(self, rows: slice | Indices, correlation: Floats, at: Indices) -> NDArray[np.float32]:
        linear = (self._columns[rows] * self._scale) @ self._columns[at].T
        outer = np.float32(self._multiple) * self._local[rows][:, None] * self._local[at]
        return np.asarray(linear + outer * correlation, np.float32)

    def variance(self, rows: Indices, correlation: Floats) -> Values:
        """Of candidates (B,), given their correlations (B, M) with the observations."""
        known = self._covariance(rows, correlation, self._at).astype(float).T * self._root[:, None]
        explained = (_solve(self._factor, known) ** 2).sum(axis=0)
        return np.maximum(self._prior_variance(rows) - explained, 1e-10)

    def variance_bound(self, rows: slice, correlation: Floats) -> Values:
        """At least the variance: with few observations taken into account."""
        known = self._covariance(rows, correlation[:, self._chosen], self._at[self._chosen])
        explained = ((known @ self._whitened.T) ** 2).sum(axis=1, dtype=float)
        return np.maximum(self._prior_variance(rows) - explained, 1e-10) * 1.001 + 1e-6  # single precision


class _View:
    """The candidates as they look after what was observed."""

    def __init__(self, search: ExpectedImprovement, observed: Sequence[Observed], pending: list[int]) -> None:
        self._search, given = search, search._given
        self._taken = np.zeros(len(given.throughput), bool)
        self._taken[[one.candidate for one in observed]] = True
        self._taken[pending] = True
        measured = [one for one in observed if one.throughput is not None]
        eligible = [
            one.throughput
            for one in measured
            if one.throughput is not None and (one.peak_bytes is None or one.peak_bytes <= given.capacity_bytes)
        ]
        self.best_throughput = max(eligible, default=None)

        timed, times, time_sides = self._timed(observed)
        sized, sizes, size_sides = self._sized(observed)
        tried = [one for one in observed if one.failed or one.throughput is not None]
        at, where = np.unique(
            np.concatenate([timed, sized, np.array([one.candidate for one in tried], np.int64)]), return_inverse=True
        )
        cross = search._correlation(at, at).astype(float)
        rows_timed, rows_sized, rows_tried = np.split(where, [len(timed), len(timed) + len(sized)])
        self._at, self._rows_timed, self._rows_sized = at, rows_timed, rows_sized
        self._time = search._time.condition(timed, cross[np.ix_(rows_timed, rows_timed)], times, time_sides)
        self._memory = search._memory.condition(sized, cross[np.ix_(rows_sized, rows_sized)], sizes, size_sides)
        # Columns: mean of throughput, mean of memory, trials nearby, failures nearby.
        self._weights = np.zeros((len(at), 4), np.float32)
        np.add.at(self._weights[:, 0], rows_timed, self._time.local_weights)
        np.add.at(self._weights[:, 1], rows_sized, self._memory.local_weights)
        np.add.at(self._weights[:, 2], rows_tried, 1.0)
        np.add.at(self._weights[:, 3], rows_tried, [float(one.failed) for one in tried])

        self._believed, self._belief = self._incumbents(pending)
        if pending:
            # Their expected values change no mean, and make their neighbours less uncertain.
            more = np.array(pending, np.int64)
            means = self._time.mean(more, search._correlation(more, at) @ self._weights[:, 0])
            timed, times = np.concatenate([timed, more]), np.concatenate([times, means])
            self._at = np.concatenate([at, more])
            self._rows_timed = np.concatenate([rows_timed, len(at) + np.arange(len(more))])
            self._weights = np.vstack([self._weights, np.zeros((len(more), 4), np.float32)])
            sides = np.concatenate([time_sides, np.zeros(len(more), np.int64)])
            cross = search._correlation(timed, timed).astype(float)
            self._time = search._time.condition(timed, cross, times, sides)
            self._weights[:, 0] = 0
            np.add.at(self._weights[:, 0], self._rows_timed, self._time.local_weights)

    def _timed(self, observed: Sequence[Observed]) -> tuple[Indices, Values, Indices]:
        found = [
            (one.candidate, one.throughput or one.at_most or 1.0, 0 if one.throughput is not None else -1)
            for one in observed
            if one.throughput is not None or one.at_most is not None
        ]
        at = np.array([row[0] for row in found], np.int64)
        values = np.log(np.array([row[1] for row in found], float))
        return at, values - self._search._log_throughput[at], np.array([row[2] for row in found], np.int64)

    def _sized(self, observed: Sequence[Observed]) -> tuple[Indices, Values, Indices]:
        given = self._search._given
        found = [
            (one.candidate, one.peak_bytes or given.capacity_bytes, int(one.peak_bytes is None))
            for one in observed
            if one.peak_bytes is not None or one.ran_out
        ]
        at = np.array([row[0] for row in found], np.int64)
        values = np.log(np.array([row[1] for row in found], float) / given.peak_bytes[at])
        sides = np.array([row[2] for row in found], np.int64)
        near = np.argsort(np.abs(self._search._log_room[at]), kind="stable")[:_NEAR_ROWS]
        return at[near], values[near], sides[near]

    def _incumbents(self, pending: list[int]) -> tuple[float | None, float]:
        """What the best running trial is expected to reach, as a logarithm, and how probably it does."""
        if not pending:
            return None, 0.0
        rows = np.array(pending, np.int64)
        correlation = self._search._correlation(rows, self._at)
        means, fits, runs, _, _ = self._judge(rows, correlation, correlation @ self._weights)
        logs = self._search._log_throughput[rows] + means
        first = int(np.argmax(logs + np.log(fits * runs + 1e-300)))
        return float(logs[first]), float(fits[first] * runs[first])

    def _judge(
        self, rows: Indices, correlation: Floats, sums: Floats
    ) -> tuple[Values, Values, Values, Values, Values]:
        """Mean and deviation of the throughput's residual, P(fits), P(runs) and its logarithm's score, all (B,).

        Returned as mean, P(fits), P(runs), deviation, score.
        """
        means = self._time.mean(rows, sums[:, 0])
        deviations = np.sqrt(self._time.variance(rows, correlation[:, self._rows_timed]))
        room = self._search._log_room[rows] - self._memory.mean(rows, sums[:, 1])
        spread = np.sqrt(self._memory.variance(rows, correlation[:, self._rows_sized]))
        log_fits = log_ndtr(room / spread)
        runs = _run_probability(sums)
        score = self._score(rows, means, deviations, log_fits, runs)
        return means, np.exp(log_fits), runs, deviations, score

    def _score(
        self, rows: Indices | slice, means: Values, deviations: Values, log_fits: Values, runs: Values
    ) -> Values:
        logs = self._search._log_throughput[rows] + means
        gain = self._log_gain(logs, deviations)
        return np.asarray(gain + log_fits + np.log(runs) - self._search._log_cost[rows])

    def _log_gain(self, logs: Values, deviations: Values) -> Values:
        """Logarithm of the expected improvement in throughput."""
        best = None if self.best_throughput is None else float(np.log(self.best_throughput))
        alone = _log_improvement(logs, deviations, best)
        believed = getattr(self, "_believed", None)
        if believed is None or (best is not None and believed <= best):
            return alone
        belief = min(max(self._belief, 1e-12), 1 - 1e-12)
        beaten = _log_improvement(logs, deviations, believed)
        return np.logaddexp(np.log(belief) + beaten, np.log1p(-belief) + alone)

    def best(self) -> Proposal | None:
        """Candidates in the order of a bound on their score, until no bound reaches the best score."""
        bounds, sums, means = self._bounds()
        bounds[self._taken] = -np.inf
        winner: tuple[float, int] | None = None
        left = np.argsort(-bounds, kind="stable")
        for start in range(0, len(left), _CHUNK):
            rows = left[start : start + _CHUNK]
            rows = rows[bounds[rows] > (winner[0] if winner else -np.inf)]
            if not len(rows):
                break
            correlation = self._search._correlation(rows, self._at)
            _, fits, _, _, scores = self._judge(rows, correlation, sums[rows])
            scores[fits < LEAST_FIT_PROBABILITY] = -np.inf
            top = int(np.argmax(scores))
            if scores[top] > (winner[0] if winner else -np.inf):
                winner = float(scores[top]), int(rows[top])
        return None if winner is None else self._explain(winner[1], sums, means)

    def _bounds(self) -> tuple[Values, NDArray[np.float32], Values]:
        """(N,) upper bounds of scores, (N, 4) sums of correlations, (N,) log throughputs."""
        search = self._search
        count = len(search._log_throughput)
        bounds, logs = np.empty(count), np.empty(count)
        sums = np.empty((count, 4), np.float32)
        for start in range(0, count, _CHUNK):
            rows = slice(start, min(start + _CHUNK, count))
            correlation = search._correlation(rows, self._at)
            sums[rows] = correlation @ self._weights
            means = self._time.mean(rows, sums[rows, 0])
            deviations = np.sqrt(self._time.variance_bound(rows, correlation[:, self._rows_timed]))
            room = search._log_room[rows] - self._memory.mean(rows, sums[rows, 1])
            spread = np.sqrt(self._memory.variance_bound(rows, correlation[:, self._rows_sized]))
            # More spread makes what is expected not to fit more probable to fit, and the rest less.
            log_fits = np.where(room < 0, log_ndtr(room / spread), 0.0)
            bounds[rows] = self._score(rows, means, deviations, log_fits, _run_probability(sums[rows])) + 1e-6
            logs[rows] = search._log_throughput[rows] + means
        return bounds, sums, logs

    def _explain(self, candidate: int, sums: NDArray[np.float32], logs: Values) -> Proposal:
        rows = np.array([candidate])
        correlation = self._search._correlation(rows, self._at)
        _, fits, runs, deviations, scores = (
            float(values[0]) for values in self._judge(rows, correlation, sums[candidate : candidate + 1])
        )
        given = self._search._given
        gain = None
        if self.best_throughput is not None:
            log_gain = self._log_gain(logs[rows], np.array([deviations]))[0]
            gain = float(np.exp(log_gain - np.log(self.best_throughput))) * fits * runs
        return Proposal(
            candidate=candidate,
            predicted_throughput=float(given.throughput[candidate]),
            throughput=float(np.exp(logs[candidate])),
            throughput_deviation=deviations,
            fit_probability=fits,
            run_probability=runs,
            best_throughput=self.best_throughput,
            expected_gain=gain,
            cost=float(given.cost[candidate]),
            score=scores,
            rank_by_throughput=1 + int((logs[~self._taken] > logs[candidate]).sum()),
        )


def _run_probability(sums: Floats) -> Values:
    """From trials and failures nearby: 1 - mean of the Beta posterior."""
    trials, failures = sums[:, 2].astype(float), sums[:, 3].astype(float)
    failing = (FAILURE_RATE * FAILURE_STRENGTH + failures) / (FAILURE_STRENGTH + trials)
    return np.asarray(1 - np.clip(failing, 0.0, 0.999))


def _log_improvement(logs: Values, deviations: Values, best: float | None) -> Values:
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


def _axis_columns(features: Values) -> Values:
    """Columns whose products are the sum of one squared-exponential kernel an axis, all of variance 1: (N, P)."""
    found = [np.zeros((len(features), 0))]
    for axis in features.T:
        values, rows = np.unique(axis, return_inverse=True)
        if len(values) > _BINS:
            values = np.unique(np.quantile(axis, np.linspace(0, 1, _BINS)))
            rows = np.abs(axis[:, None] - values).argmin(axis=1)
        kernel = np.exp(-((values[:, None] - values) ** 2) / (2 * LENGTH**2))
        sizes, directions = np.linalg.eigh(kernel)
        kept = sizes > 1e-6
        found.append((directions[:, kept] * np.sqrt(sizes[kept]))[rows])
    return np.hstack(found)


def _fit(parts: Sequence[Values], values: Values, noise: float) -> tuple[float, float, float, float]:
    """The most probable multiples of the widths of three parts and of the noise."""
    grid = np.array(list(product(MULTIPLES, MULTIPLES, MULTIPLES, NOISE_MULTIPLES)))
    score = -0.5 * (np.log(grid) ** 2).sum(axis=1) / MULTIPLE_DEVIATION**2
    if len(values):
        stack = np.tensordot(grid[:, :3] ** 2, np.stack(parts), axes=1)
        stack += (grid[:, 3] * noise)[:, None, None] ** 2 * np.eye(len(values))
        factors = np.linalg.cholesky(stack)
        whitened = np.linalg.solve(factors, np.broadcast_to(values[:, None], (len(grid), len(values), 1)))[..., 0]
        score -= 0.5 * (whitened**2).sum(axis=1)
        score -= np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)
    common, axes, local, noises = (float(value) for value in grid[int(np.argmax(score))])
    return common, axes, local, noises


def _sites(covariance: Values, values: Values, sides: Indices, noise: float) -> tuple[Values, Values]:
    """Precision and precision x mean of the Gaussian that stands for each observation (M,)."""
    precision = np.where(sides == 0, noise**-2, 1e-8)
    shift = np.where(sides == 0, values * noise**-2, 0.0)
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
        total = np.sqrt(spread + noise**2)
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
    chosen: list[int] = []
    for step in range(count):
        pivot = int(np.argmax(np.where(np.isin(np.arange(len(left)), chosen), -1.0, left)))
        row = covariance[pivot] - rows[:step, pivot] @ rows[:step]
        rows[step] = row / np.sqrt(max(left[pivot] + 1 / precision[pivot], 1e-12))
        left = np.maximum(left - rows[step] ** 2, 0.0)
        chosen.append(pivot)
    return np.array(chosen, np.int64)


def _solve(factor: Values, right: Values, *, transposed: bool = False) -> Values:
    return np.asarray(solve_triangular(factor, right, lower=True, trans=int(transposed), check_finite=False))
