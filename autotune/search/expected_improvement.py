"""Which candidate to run next: expected improvement under a joint posterior over throughput and memory.

Predictions are the prior, measurements correct them. For every candidate i, with x_i its features,

    log throughput_i = log predicted_i - log(sum_k share_ik·exp(s_k)) + b + sum_j m_j(x_ij) + l(x_i) + noise
    log peak_i       = log predicted peak_i + b' + sum_j m'_j(x_ij) + l'(x_i) + noise

`posterior.py` has the model and its letters. What failed for other reasons makes its neighbours suspect: a Beta prior,
in which a neighbour counts by its kernel.

    score = expected improvement x P(fits) x P(runs) / cost

with improvement as a ratio of the best so far (its logarithm, so that scores stay comparable where they are tiny: Ament
et al., arXiv:2310.20708), and with the throughput itself while nothing was measured. Running trials are taken to come
out as expected (Ginsbourger et al., "Kriging is well-suited to parallelize optimization", 2010), their success to be
as probable as it is.

Left out: noise of the best measurement so far (confirmation is for that), and lookahead over more than one trial.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr, ndtri

from autotune.search.candidates import Candidates, Observed
from autotune.search.gain import Front, log_improvement
from autotune.search.posterior import LENGTH, Evidence, Floats, Indices, Model, Posterior, Values, axis_columns

# Widths of the prior. All are judgement, none is a fit; but the form of the model, and one floor, were changed after
# looking at replays of measured sweeps (benchmarks/README.md).
BIAS_DEVIATION = 0.3
"""Of the logarithm of all throughputs together."""
AXIS_DEVIATION = 0.1
"""Of what one axis does beyond the prediction: what formulas leave out."""
LOCAL_DEVIATION = 0.1
"""Of what a combination does: the same."""
UNTIMED_DEVIATION = 0.3
"""In place of both where no time is predicted: then it is of all that an axis or a combination does to a step."""
NOISE_DEVIATION = 0.05
"""Of a measured throughput: short trials on one cluster repeat within a few percent."""
MEMORY_SHARES = (0.5, 0.25, 0.25)
"""Of the variance of a memory prediction: bias, axes together, combinations. Errors of a formula are mostly common."""
EARLIER_DEVIATION, EARLIER_MEMORY_DEVIATION = 0.1, 0.03
"""Of what an earlier study measured as a measure of the same deviation from the prediction here, beyond its noise."""
FAILURE_RATE, FAILURE_STRENGTH = 0.05, 1.0
"""Of trials that fail for no known reason; and after how many trials' worth of doubt neighbours outweigh it."""
LEAST_FIT_PROBABILITY = 1e-3
"""What is less likely to fit is not worth a launch, even when nothing else is left."""

Row = TypeVar("Row")

_ROUNDS = 4
_MOST_ROWS = 256
"""Observations of throughput that are kept: the best half of them, and evenly of the rest."""
_EARLIER_ROWS = 64
"""The same of earlier studies, evenly."""
_NEAR_ROWS = 128
"""Observations of memory that are kept: those next to the capacity, which decide."""
MOST_TRIED = 512
"""Trials that tell how probable others of their kind are to run: failures first, and evenly of the rest."""
_CHUNK = 2048
_BLOCK = 512


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


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a measurement of each candidate is expected to show, after what was observed."""

    throughput: Values
    """(N,) medians, of N candidates."""
    throughput_deviation: Values
    """(N,) of the logarithm, a measurement's own noise included."""
    peak_bytes: Values
    """(N,) medians."""
    peak_deviation: Values
    """(N,) of the logarithm."""
    fit_probability: Values
    """(N,)"""

    def throughput_between(self, coverage: float = 0.8) -> tuple[Values, Values]:
        """Bounds (N,) of the interval that holds a measured throughput with this probability (0..1)."""
        return _between(self.throughput, self.throughput_deviation, coverage)

    def peak_between(self, coverage: float = 0.8) -> tuple[Values, Values]:
        """The same of the peak."""
        return _between(self.peak_bytes, self.peak_deviation, coverage)


class ExpectedImprovement:
    """Proposes candidates. Holds no state but the candidates: what was observed is given each time.

    Args:
        candidates: to choose from.
        trade_memory: less peak memory is worth something too, see `Front`.
    """

    def __init__(self, candidates: Candidates, *, trade_memory: bool = False) -> None:
        self._given, self._trade_memory = candidates, trade_memory
        self._features = np.asarray(candidates.features, np.float32)
        axes = axis_columns(candidates.features)
        count, width = len(candidates.throughput), candidates.peak_deviation
        is_timed = candidates.shares.shape[1] > 0
        self._time = Model(
            np.full(count, BIAS_DEVIATION),
            candidates.shares,
            candidates.unknowns,
            (AXIS_DEVIATION if is_timed else UNTIMED_DEVIATION) * axes,
            np.full(count, LOCAL_DEVIATION if is_timed else UNTIMED_DEVIATION),
            candidates.issued,
        )
        common, by_axis, local = np.sqrt(MEMORY_SHARES)
        by_axis /= np.sqrt(max(candidates.features.shape[1], 1))
        self._memory = Model(
            common * width,
            np.zeros((count, 0)),
            np.zeros((0, 0)),
            by_axis * width[:, None] * axes,
            local * width,
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
        return _View(self, observed, sorted(set(pending))).best()

    def expect(self, observed: Sequence[Observed], rows: Indices | None = None) -> Expectation:
        """What is believed of candidates, by default of all; before anything was observed, predictions and widths.

        For people, who ask how far off it may be; proposals take the most probable widths for granted, and what is
        late to add up with the rest, which moves on sooner from what was very wrong.
        """
        wanted = np.arange(len(self._log_throughput)) if rows is None else rows
        return _View(self, observed, [], averaged=True).expectation(wanted)

    def _correlation(self, rows: Indices | slice, at: Indices) -> NDArray[np.float32]:
        """exp(-|x - y|² / (2·LENGTH²)) of rows (B,) and observations (M,), as (B, M)."""
        left, right = self._features[rows] / LENGTH, self._features[at] / LENGTH
        found = left @ right.T
        found -= 0.5 * (left**2).sum(axis=1)[:, None]
        found -= 0.5 * (right**2).sum(axis=1)[None]
        return np.exp(np.minimum(found, 0, out=found), out=found)


class _View:
    """The candidates as they look after what was observed."""

    def __init__(
        self, search: ExpectedImprovement, observed: Sequence[Observed], pending: list[int], *, averaged: bool = False
    ) -> None:
        self._search, given = search, search._given
        self._taken = np.zeros(len(given.throughput), bool)
        self._taken[[one.candidate for one in observed]] = True
        self._taken[pending] = True
        self._offered = len(self._taken) if given.offered is None else given.offered
        self._taken[self._offered :] = True
        own = [one for one in observed if one.candidate < self._offered]
        measured = [one for one in own if one.throughput is not None]
        eligible = [
            one.throughput
            for one in measured
            if one.throughput is not None and (one.peak_bytes is None or one.peak_bytes <= given.capacity_bytes)
        ]
        self.best_throughput = max(eligible, default=None)
        trades = search._trade_memory and self.best_throughput is not None
        self._front = Front.of(measured, given.capacity_bytes) if trades else None

        timed, sized = self._timed(observed), self._sized(observed)
        tried = [one for one in own if one.failed or one.throughput is not None or one.at_most is not None]
        where, self._stands_for, self._failed = sampled(tried)
        self._set_rows(timed, sized, where)
        cross = search._correlation(self._at, self._at).astype(float)
        of_time, of_size = np.ix_(self._of_time, self._of_time), np.ix_(self._of_size, self._of_size)
        self._time = search._time.condition(timed, cross[of_time], _ROUNDS, timed.at < self._offered, averaged=averaged)
        self._memory = search._memory.condition(sized, cross[of_size], 1, sized.at < self._offered)
        self._set_weights()
        self._running: tuple[float, float] | None = None
        if pending:
            # Their expected values change no mean, and make their neighbours less uncertain.
            more = np.array(pending, np.int64)
            means, self._running = self._expect(more)
            belief = self._time.belief
            zeros = np.zeros(len(more))
            timed += Evidence(more, means, np.zeros_like(more), zeros + NOISE_DEVIATION)
            self._set_rows(timed, sized, self._at[self._of_trial])
            self._time = Posterior(
                search._time,
                timed,
                search._correlation(timed.at, timed.at).astype(float),
                replace(belief, doubt=np.concatenate([belief.doubt, zeros])),
            )
            self._set_weights()

    def _set_rows(self, timed: Evidence, sized: Evidence, tried: Indices) -> None:
        """Every candidate of which something is known, once, and where the observations of each kind are."""
        self._at, where = np.unique(np.concatenate([timed.at, sized.at, tried]), return_inverse=True)
        ends = np.cumsum([len(timed.at), len(sized.at)])
        self._of_time, self._of_size, self._of_trial = np.split(where, ends)

    def _set_weights(self) -> None:
        """Columns: local mean of throughput, of memory, trials nearby, failures nearby."""
        self._weights = np.zeros((len(self._at), 4), np.float32)
        for column, (rows, weights) in enumerate(
            (
                (self._of_time, self._time.local_weights),
                (self._of_size, self._memory.local_weights),
                (self._of_trial, self._stands_for),
                (self._of_trial, self._failed),
            )
        ):
            np.add.at(self._weights[:, column], rows, weights.astype(np.float32))

    def _timed(self, observed: Sequence[Observed]) -> Evidence:
        rows = [
            (one.candidate, float(np.log(value)), 0 if one.throughput is not None else -1, NOISE_DEVIATION)
            for one in observed
            if (value := one.at_most if one.throughput is None else one.throughput) is not None
        ]
        earlier = [(*row[:3], float(np.hypot(row[3], EARLIER_DEVIATION))) for row in rows if row[0] >= self._offered]
        rows = [row for row in rows if row[0] < self._offered]
        if len(rows) > _MOST_ROWS:
            rows.sort(key=lambda row: -row[1])
            half = _MOST_ROWS // 2
            rows = rows[:half] + _evenly(rows[half:], half)
        found = Evidence.of(rows + _evenly(earlier, _EARLIER_ROWS))
        return replace(found, values=found.values - self._search._log_throughput[found.at])

    def _sized(self, observed: Sequence[Observed]) -> Evidence:
        given = self._search._given
        found = Evidence.of(
            [
                (one.candidate, one.peak_bytes or given.capacity_bytes, int(one.peak_bytes is None), one.peak_deviation)
                for one in observed
                if one.peak_bytes is not None or one.ran_out
            ]
        )
        widened = np.hypot(found.deviations, EARLIER_MEMORY_DEVIATION)
        found = replace(found, deviations=np.where(found.at < self._offered, found.deviations, widened))
        found = replace(found, values=np.log(found.values / given.peak_bytes[found.at]))
        return found[np.argsort(np.abs(self._search._log_room[found.at]), kind="stable")[:_NEAR_ROWS]]

    def _expect(self, pending: Indices) -> tuple[Values, tuple[float, float]]:
        """Residuals of running trials; of the best of them the logarithm, and how probable it is to succeed."""
        correlation = self._search._correlation(pending, self._at)
        seen = self._judge(pending, correlation, correlation @ self._weights)
        first = int(np.argmax(seen.logs + seen.log_success))
        residuals = seen.logs - self._search._log_throughput[pending]
        return residuals, (float(seen.logs[first]), float(np.exp(seen.log_success[first])))

    def _judge(
        self, rows: Indices | slice, correlation: Floats, sums: NDArray[np.float32], *, bound: bool = False
    ) -> "_Judgement":
        """Candidates (B,), from correlations (B, M) and their sums (B, 4); or bounds of what they may score."""
        search = self._search
        means, deviations = self._time.at(rows, correlation, self._of_time, sums[:, 0], bound=bound)
        bytes_mean, spread = self._memory.at(rows, correlation, self._of_size, sums[:, 1], bound=bound)
        room = search._log_room[rows] - bytes_mean
        log_fits = log_ndtr(room / spread)
        if bound:
            # More spread makes what is expected not to fit more probable to fit, and the rest less.
            log_fits[room >= 0] = 0.0
        trials, failures = sums[:, 2].astype(float), sums[:, 3].astype(float)
        # Mean of the Beta posterior.
        failing = (FAILURE_RATE * FAILURE_STRENGTH + failures) / (FAILURE_STRENGTH + trials)
        log_runs = np.log1p(-np.clip(failing, 0.0, 0.999))
        logs = search._log_throughput[rows] + means
        if self._front is None:
            log_gain = self._log_gain(logs, deviations)
        else:
            peaks = search._given.peak_bytes[rows] * np.exp(bytes_mean)
            log_gain = self._front.log_gain(logs, deviations, peaks)
        scores = log_gain + log_fits + log_runs - search._log_cost[rows]
        return _Judgement(logs, deviations, log_fits, log_runs, log_gain, scores)

    def _log_gain(self, logs: Values, deviations: Values) -> Values:
        """Logarithm of the expected improvement in throughput."""
        best = None if self.best_throughput is None else float(np.log(self.best_throughput))
        alone = log_improvement(logs, deviations, best)
        if self._running is None or (best is not None and self._running[0] <= best):
            return alone
        reached, probability = self._running
        probability = min(max(probability, 1e-12), 1 - 1e-12)
        beaten = log_improvement(logs, deviations, reached)
        return np.asarray(np.logaddexp(np.log(probability) + beaten, np.log1p(-probability) + alone))

    def best(self) -> Proposal | None:
        """Candidates in the order of a bound on their score, until no bound reaches the best score."""
        count = len(self._taken)
        bounds, logs = np.empty(count), np.empty(count)
        sums = np.empty((count, 4), np.float32)
        for start in range(0, count, _CHUNK):
            rows = slice(start, start + _CHUNK)
            correlation = self._search._correlation(rows, self._at)
            sums[rows] = correlation @ self._weights
            seen = self._judge(rows, correlation, sums[rows], bound=True)
            bounds[rows], logs[rows] = seen.worth, seen.logs
        bounds[self._taken] = -np.inf
        winner, top = -1, -np.inf
        left = np.flatnonzero(bounds > -np.inf)
        while len(left):
            few = np.argpartition(-bounds[left], _BLOCK)[:_BLOCK] if len(left) > _BLOCK else np.arange(len(left))
            block = np.sort(left[few])
            correlation = self._search._correlation(block, self._at)
            seen = self._judge(block, correlation, sums[block])
            scores = seen.worth
            if scores.max() > top:
                winner, top = int(block[np.argmax(scores)]), float(scores.max())
            bounds[block] = -np.inf
            left = left[bounds[left] > top]
        return None if winner < 0 else self._explain(winner, sums, logs)

    def expectation(self, wanted: Indices) -> Expectation:
        """Of candidates."""
        search, given = self._search, self._search._given
        found = np.empty((5, len(wanted)))
        for start in range(0, len(wanted), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            rows = wanted[chunk]
            correlation = search._correlation(rows, self._at)
            sums = correlation @ self._weights
            means, deviations = self._time.at(rows, correlation, self._of_time, sums[:, 0], bound=False)
            sizes, spreads = self._memory.at(rows, correlation, self._of_size, sums[:, 1], bound=False)
            found[0, chunk] = np.exp(search._log_throughput[rows] + means)
            found[1, chunk] = np.hypot(deviations, self._time.belief.multiples[3] * NOISE_DEVIATION)
            found[2, chunk] = given.peak_bytes[rows] * np.exp(sizes)
            found[3, chunk] = spreads
            found[4, chunk] = ndtr((search._log_room[rows] - sizes) / spreads)
        return Expectation(*found)

    def _explain(self, candidate: int, sums: NDArray[np.float32], logs: Values) -> Proposal:
        rows = np.array([candidate])
        seen = self._judge(rows, self._search._correlation(rows, self._at), sums[rows])
        given, gain = self._search._given, None
        if self.best_throughput is not None:
            whole = self.best_throughput if self._front is None else self._front.volume
            gain = float(np.exp(seen.log_gain + seen.log_success)[0]) / whole
        return Proposal(
            candidate=candidate,
            predicted_throughput=float(given.throughput[candidate]),
            throughput=float(np.exp(seen.logs[0])),
            throughput_deviation=float(seen.deviations[0]),
            fit_probability=float(np.exp(seen.log_fits[0])),
            run_probability=float(np.exp(seen.log_runs[0])),
            best_throughput=self.best_throughput,
            expected_gain=gain,
            cost=float(given.cost[candidate]),
            score=float(seen.scores[0]),
            rank_by_throughput=1 + int((logs[~self._taken] > logs[candidate]).sum()),
        )


@dataclass(frozen=True, slots=True)
class _Judgement:
    """Of candidates (B,); all but deviations are logarithms."""

    logs: Values
    """Median throughput."""
    deviations: Values
    log_fits: Values
    log_runs: Values
    log_gain: Values
    scores: Values

    @property
    def worth(self) -> Values:
        """The score, of what may fit at all."""
        return np.where(self.log_fits < np.log(LEAST_FIT_PROBABILITY), -np.inf, self.scores)

    @property
    def log_success(self) -> Values:
        """That it fits and runs."""
        return self.log_fits + self.log_runs


def _evenly(rows: list[Row], count: int) -> list[Row]:
    return rows if len(rows) <= count else [rows[at] for at in np.linspace(0, len(rows) - 1, count).astype(int)]


def sampled(tried: Sequence[Observed]) -> tuple[Indices, Values, Values]:
    """Candidates of at most `MOST_TRIED` trials, how many trials each stands for, and how many failures."""
    failed = [one for one in tried if one.failed][-MOST_TRIED // 2 :]
    ran = [one for one in tried if not one.failed]
    kept = MOST_TRIED - len(failed)
    chosen = _evenly(ran, kept)
    weights = np.repeat([1.0, len(ran) / max(1, len(chosen))], [len(failed), len(chosen)])
    where = np.array([one.candidate for one in failed + chosen], np.int64)
    return where, weights, np.array([float(one.failed) for one in failed + chosen])


def _between(median: Values, deviation: Values, coverage: float) -> tuple[Values, Values]:
    reach = np.exp(float(ndtri(0.5 + coverage / 2)) * deviation)
    return median / reach, median * reach
