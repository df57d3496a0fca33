"""What is proposed is new, legal and worth it, in worlds whose predictions are wrong in known ways."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autotune.predict.roofline import TimePart
from autotune.predict.step import StepTimes
from autotune.search import expected_improvement as module
from autotune.search import posterior
from autotune.search.candidates import Candidates, Observed
from autotune.search.expected_improvement import ExpectedImprovement, Proposal
from autotune.search.gain import Front, log_improvement
from autotune.search.step_parts import step_columns, step_unknowns

Values = NDArray[np.float64]
CAPACITY = 80e9


@dataclass(frozen=True)
class World:
    """Candidates, and what each of them really does."""

    candidates: Candidates
    throughput: Values
    peak_bytes: Values
    fails: NDArray[np.bool_]

    def run(self, candidate: int) -> Observed:
        if self.peak_bytes[candidate] > CAPACITY:
            return Observed(candidate=candidate, ran_out=True)
        if self.fails[candidate]:
            return Observed(candidate=candidate, failed=True)
        return Observed(
            candidate=candidate,
            throughput=float(self.throughput[candidate]),
            peak_bytes=float(self.peak_bytes[candidate]),
        )

    @property
    def best(self) -> float:
        return float(self.throughput[(self.peak_bytes <= CAPACITY) & ~self.fails].max())


def a_world(seed: int = 0, count: int = 150, slower: float = 1.0, bigger: float = 1.0) -> World:
    """Steps of three parts, the second really `slower` times as long; peaks really `bigger` times as large."""
    chance = np.random.default_rng(seed)
    grid = np.array(list(product(range(4), range(4), range(5), range(2))), float)
    features = grid[chance.choice(len(grid), min(count, len(grid)), replace=False)]
    if count > len(grid):
        features = chance.integers(0, 8, (count, 6)).astype(float)
    work, network = np.full(len(features), 4.0), 2 ** features[:, 0]
    late = 8 * 2 ** -features[:, 1]
    parts = np.stack([work, network, late], axis=1)
    step = parts.sum(axis=1)
    real = (parts * [1, slower, 1]).sum(axis=1) * np.exp(chance.normal(0, 0.03, len(features)))
    peak = 8e9 * 2 ** (features[:, 2] * 0.6 + features[:, 3] * 0.8)
    candidates = Candidates(
        features=features,
        throughput=1e4 / step,
        shares=parts / step[:, None],
        unknowns=0.3 * np.eye(3),
        peak_bytes=peak,
        peak_deviation=np.full(len(features), 0.08),
        capacity_bytes=CAPACITY,
        cost=np.ones(len(features)),
    )
    return World(candidates, 1e4 / real, peak * bigger, chance.random(len(features)) < 0.1)


def drive(world: World, launches: int, at_once: int = 1) -> list[Proposal]:
    """Keeps `at_once` trials running; the oldest ends first."""
    search, observed = ExpectedImprovement(world.candidates), list[Observed]()
    pending, proposals = list[int](), list[Proposal]()
    while len(proposals) < launches:
        proposal = search.propose(observed, pending)
        if proposal is not None:
            proposals.append(proposal)
            pending.append(proposal.candidate)
        elif not pending:
            break
        if proposal is None or len(pending) == at_once:
            observed.append(world.run(pending.pop(0)))
    return proposals


def reached(world: World, proposals: list[Proposal]) -> float:
    found = [world.run(proposal.candidate).throughput or 0.0 for proposal in proposals]
    return max(found) / world.best


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slower=st.floats(0.2, 10),
    bigger=st.floats(0.5, 3),
    at_once=st.integers(1, 5),
)
def test_nothing_is_proposed_twice_and_everything_ends(seed: int, slower: float, bigger: float, at_once: int) -> None:
    world = a_world(seed, 25, slower, bigger)
    proposals = drive(world, 1000, at_once)
    launched = [proposal.candidate for proposal in proposals]
    assert len(set(launched)) == len(launched) <= 25
    assert all(0 <= candidate < 25 for candidate in launched)
    for proposal in proposals:
        assert np.isfinite(proposal.score)
        assert module.LEAST_FIT_PROBABILITY <= proposal.fit_probability <= 1
        assert 0 < proposal.run_probability < 1
        assert proposal.expected_gain is None or proposal.expected_gain >= 0


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_world_where_everything_runs_out_of_memory_ends_before_all_was_tried(at_once: int) -> None:
    world = a_world(count=150)
    alike = replace(world.candidates, peak_bytes=np.maximum(world.candidates.peak_bytes, 0.6 * CAPACITY))
    world = replace(world, candidates=alike, peak_bytes=np.full(150, 1e15))
    proposals = drive(world, 1000, at_once)
    assert 1 <= len(proposals) < 100
    assert proposals[0].fit_probability > 0.99
    assert proposals[-1].fit_probability < 0.05
    assert all(proposal.best_throughput is None for proposal in proposals)


def test_no_candidates_left_is_none() -> None:
    world = a_world(count=3)
    world = replace(world, peak_bytes=np.full(3, 1e9))
    search = ExpectedImprovement(world.candidates)
    assert search.propose([world.run(0), world.run(1)], [2]) is None


def test_nothing_that_surely_does_not_fit_is_proposed() -> None:
    world = a_world()
    huge = replace(world.candidates, peak_bytes=np.full(150, 2 * CAPACITY))
    assert ExpectedImprovement(huge).propose([]) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slower", [0.3, 1.0, 8.0])
def test_a_part_that_is_mispredicted_is_found_out(seed: int, slower: float) -> None:
    world = a_world(seed, slower=slower)
    assert reached(world, drive(world, 8)) > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_without_predictions_it_still_searches(seed: int) -> None:
    world = a_world(seed)
    blind = replace(world.candidates, throughput=np.ones(150), shares=np.zeros((150, 0)), unknowns=np.zeros((0, 0)))
    assert reached(world, drive(replace(world, candidates=blind), 25)) > 0.9


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_unit_of_throughput_does_not_matter(at_once: int) -> None:
    world = a_world(1, slower=3)
    scaled = replace(
        world,
        candidates=replace(world.candidates, throughput=world.candidates.throughput * 1024),
        throughput=world.throughput * 1024,
    )
    expected = [proposal.candidate for proposal in drive(world, 20, at_once)]
    assert [proposal.candidate for proposal in drive(scaled, 20, at_once)] == expected


def test_parallel_search_is_hardly_worse_than_one_by_one() -> None:
    world = a_world(2, slower=4)
    assert reached(world, drive(world, 12, at_once=4)) > 0.95


def test_the_cheaper_of_two_alike_comes_first() -> None:
    world = a_world()
    search = ExpectedImprovement(world.candidates)
    first = search.propose([])
    assert first is not None
    cost = np.ones(150)
    cost[first.candidate] = 1000
    other = ExpectedImprovement(replace(world.candidates, cost=cost)).propose([])
    assert other is not None
    assert other.candidate != first.candidate


def look_at(world: World, candidate: int, observed: list[Observed]) -> Proposal:
    """What is thought of one candidate: it is the only one that is not running."""
    found = ExpectedImprovement(world.candidates).propose(
        observed, [at for at in range(len(world.throughput)) if at != candidate]
    )
    assert found is not None
    return found


def smaller_than_capacity(world: World, ratio: float) -> int:
    return int(np.argmin(np.abs(world.candidates.peak_bytes / CAPACITY - ratio)))


def test_out_of_memory_makes_others_less_likely_to_fit_and_a_measured_peak_more() -> None:
    world = a_world()
    peaks = world.candidates.peak_bytes
    close = smaller_than_capacity(world, 1.0)
    near = np.argsort(np.abs(peaks / CAPACITY - 0.95))
    near = near[near != close][:5]
    before = look_at(world, close, []).fit_probability
    after_oom = look_at(world, close, [Observed(candidate=int(at), ran_out=True) for at in near]).fit_probability
    small = [Observed(candidate=int(at), throughput=1e3, peak_bytes=0.9 * peaks[at]) for at in near]
    after_peaks = look_at(world, close, small).fit_probability
    assert after_oom < before < after_peaks
    unsure = [replace(one, peak_deviation=0.08) for one in small]
    assert before < look_at(world, close, unsure).fit_probability < after_peaks


def test_what_was_stopped_early_teaches_a_bound() -> None:
    world = a_world()
    prior = look_at(world, 0, [])
    neighbours = np.argsort(np.abs(world.candidates.features - world.candidates.features[0]).sum(axis=1))[1:6]
    predicted = world.candidates.throughput
    slow = [Observed(candidate=int(at), at_most=0.5 * predicted[at]) for at in neighbours]
    void = [Observed(candidate=int(at), at_most=50 * predicted[at]) for at in neighbours]
    assert look_at(world, 0, slow).throughput < 0.7 * prior.throughput
    assert look_at(world, 0, void).throughput == pytest.approx(prior.throughput, rel=0.02)
    assert look_at(world, 0, slow).best_throughput is None


def test_failures_make_neighbours_suspect_and_not_the_rest() -> None:
    world = a_world()
    distance = np.abs(world.candidates.features - world.candidates.features[0]).sum(axis=1)
    order = np.argsort(distance)
    failed = [Observed(candidate=int(at), failed=True) for at in order[1:4]]
    assert look_at(world, 0, failed).run_probability < 0.5
    assert look_at(world, int(order[-1]), failed).run_probability > 0.65
    assert look_at(world, 0, []).run_probability == pytest.approx(1 - module.FAILURE_RATE)


def test_one_sick_node_does_not_move_its_neighbours() -> None:
    world = a_world(slower=1.0)
    healthy = [replace(world.run(int(at)), peak_bytes=None) for at in range(1, 30)]
    healthy = [one for one in healthy if one.throughput]
    sick = [replace(healthy[0], throughput=(healthy[0].throughput or 0) / 15), *healthy[1:]]
    assert look_at(world, 0, sick).throughput == pytest.approx(look_at(world, 0, healthy).throughput, rel=0.05)


def test_a_throughput_that_does_not_fit_teaches_but_is_not_the_best() -> None:
    world = a_world()
    one = Observed(candidate=1, throughput=1e9, peak_bytes=1.01 * CAPACITY)
    assert look_at(world, 0, [one]).best_throughput is None
    assert look_at(world, 0, [one, Observed(candidate=2, throughput=7.0)]).best_throughput == 7.0


def test_the_order_of_bounds_finds_what_looking_at_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        world = a_world(seed, count=500, slower=3)
        observed = [world.run(at) for at in range(60)]
        expected = ExpectedImprovement(world.candidates).propose(observed)
        with monkeypatch.context() as few:
            few.setattr(posterior, "_BOUND_ROWS", 2)
            few.setattr(module, "_BLOCK", 3)
            few.setattr(module, "_CHUNK", 37)
            found = ExpectedImprovement(world.candidates).propose(observed)
        assert found is not None
        assert expected is not None
        assert found.candidate == expected.candidate
        assert found.score == pytest.approx(expected.score, abs=1e-3)


def test_a_posterior_is_what_the_formulas_say() -> None:
    """Against the textbook's two lines, on a model without parts."""
    chance = np.random.default_rng(0)
    features = chance.integers(0, 5, (30, 2)).astype(float)
    axes = posterior.axis_columns(features)
    model = posterior.Model(np.full(30, 0.3), np.zeros((30, 0)), np.zeros((0, 0)), 0.1 * axes, np.full(30, 0.2))
    distances = ((features[:, None] - features) ** 2).sum(axis=2)
    whole = np.exp(-distances / (2 * posterior.LENGTH**2))
    at, rest = np.arange(12), np.arange(12, 30)
    values = chance.normal(0, 0.3, 12)
    evidence = posterior.Evidence(at, values, np.zeros(12, np.int64), np.full(12, 0.05))
    conditioned = model.condition(evidence, whole[:12, :12], rounds=0)
    mean, deviation = conditioned.at(
        rest, whole[12:, :12], np.arange(12), whole[12:, :12] @ conditioned.local_weights, bound=False
    )
    covariance = 0.09 + 0.01 * axes @ axes.T + 0.04 * whole
    inverse = np.linalg.inv(covariance[:12, :12] + 0.05**2 * np.eye(12))
    cross = covariance[12:, :12]
    np.testing.assert_allclose(mean, cross @ inverse @ values, atol=1e-4)
    expected = np.diag(covariance[12:, 12:] - cross @ inverse @ cross.T)
    np.testing.assert_allclose(deviation**2, expected, atol=1e-4)


@pytest.mark.parametrize(("side", "bound"), [(1, 0.2), (-1, 0.2), (1, -0.5), (-1, -0.3)])
def test_one_sided_observations_are_what_sampling_says(side: int, bound: float) -> None:
    covariance = np.array([[0.04, 0.03], [0.03, 0.05]])
    values, sides = np.array([bound, 0.1]), np.array([side, 0])
    noise = np.array([1e-6, 0.01])
    precision, shift = posterior._sites(covariance, values, sides, noise)
    inverse = np.linalg.inv(np.linalg.inv(covariance) + np.diag(precision))
    mean = inverse @ shift
    chance = np.random.default_rng(0)
    drawn = chance.multivariate_normal([0, 0], covariance, 400_000)
    weights = np.exp(-((drawn[:, 1] - 0.1) ** 2) / (2 * 0.01)) * (side * (drawn[:, 0] - bound) > 0)
    sampled = weights @ drawn / weights.sum()
    np.testing.assert_allclose(mean, sampled, atol=0.005)
    variance = weights @ (drawn - sampled) ** 2 / weights.sum()
    np.testing.assert_allclose(np.diag(inverse), variance, rtol=0.1)


def test_logarithmic_improvement_has_no_gaps() -> None:
    best = np.log(100.0)

    def improvement(z: float) -> float:
        return float(log_improvement(np.array([best + 0.1 * z]), np.array([0.1]), best)[0])

    # E[max(z + normal, 0)] by summation.
    grid = np.linspace(-12, 12, 200_001)
    density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi) * (grid[1] - grid[0])
    for z in (-6.0, -3.0, -1.001, -0.999, 0.0, 2.0, 8.0):
        expected = np.log(100 * 0.1 * (np.maximum(grid + z, 0) @ density))
        assert improvement(z) == pytest.approx(expected, abs=1e-4)
    steps = [improvement(z) for z in (-1e5, -2e3, -999, -500, -40, -1, 0, 5, 100)]
    assert np.isfinite(steps).all()
    assert steps == sorted(steps)


def test_unknowns_of_a_step_are_shared_by_what_they_slow_down() -> None:
    parts = list(TimePart)
    unknowns = step_unknowns(parts)
    assert unknowns.shape == (len(parts), 3 + len(parts))
    network = unknowns[:, 1] > 0
    assert {part for part, yes in zip(parts, network, strict=True) if yes} == {
        TimePart.TENSOR_PARALLEL,
        TimePart.PIPELINE_TRANSFER,
        TimePart.GRADIENT_REDUCTION,
        TimePart.PARAMETER_GATHER,
    }
    assert (np.diag(unknowns[:, 3:]) > 0).all()


def steps_of(work: Values, issue: Values, update: float = 1.0, bubble: float = 0.0) -> StepTimes:
    """A device that works so long on micro-batches that take the processor so long to issue."""
    parts = {
        TimePart.MATMUL: work,
        TimePart.LAUNCH: np.maximum(issue - work, 0),
        TimePart.BUBBLE: bubble * np.maximum(issue, work),
        TimePart.OPTIMIZER: np.full_like(work, update),
    }
    known = np.ones_like(work)
    return StepTimes(parts, known, known, known, issue)


@pytest.mark.parametrize("bubble", [0.0, 0.5])
def test_a_slow_processor_is_learned_where_it_is_late_and_known_where_it_was_not(bubble: float) -> None:
    work, issue = np.exp2(np.arange(-4.0, 6.0)), np.full(10, 1.0)
    shares, unknowns, issued = step_columns(steps_of(work, issue, bubble=bubble))
    predicted = 1 / steps_of(work, issue, bubble=bubble).step_seconds
    same = np.ones(10)
    search = ExpectedImprovement(
        Candidates(
            features=np.log2(work)[:, None],
            throughput=predicted,
            shares=shares,
            unknowns=unknowns,
            issued=issued,
            peak_bytes=same,
            peak_deviation=0.01 * same,
            capacity_bytes=2.0,
            cost=same,
        )
    )
    np.testing.assert_allclose(search.expect([]).throughput, predicted, rtol=1e-5)
    real = 1 / steps_of(work, 1.8 * issue, bubble=bubble).step_seconds
    # The two that are latest, and two whose work hides it: between them what was hidden is now late.
    seen = [Observed(candidate=at, throughput=float(real[at])) for at in (0, 1, 8, 9)]
    expected = search.expect(seen).throughput
    between = work == 1.0  # predicted to be in balance
    assert expected[between] < 0.85 * predicted[between]
    np.testing.assert_allclose(expected, real, rtol=0.12)


def test_parts_add_up_where_nothing_is_issued_beside_them() -> None:
    times = replace(steps_of(np.ones(3), np.full(3, 2.0)), issue_seconds=None)
    shares, _, issued = step_columns(times)
    assert issued is None
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)


@pytest.mark.parametrize("finished", [0, 1, 300])
def test_many_candidates(finished: int) -> None:
    world = a_world(3, count=50_000)
    observed = [world.run(at) for at in range(finished)]
    proposal = ExpectedImprovement(world.candidates).propose(observed)
    assert proposal is not None
    assert proposal.candidate >= finished
    assert proposal.rank_by_throughput >= 1


@pytest.mark.parametrize(("failures", "others"), [(0, 0), (3, 40), (10, 2000), (900, 900)])
def test_of_many_trials_a_sample_stands_for_all(failures: int, others: int) -> None:
    tried = [Observed(candidate=at, failed=True) for at in range(failures)]
    tried += [Observed(candidate=at, throughput=1.0) for at in range(failures, failures + others)]
    where, stands_for, failed = module.sampled(tried)
    assert len(where) == min(len(tried), module.MOST_TRIED)
    assert failed.sum() == min(failures, module.MOST_TRIED // 2)
    assert stands_for[failed == 0].sum() == pytest.approx(others)
    assert (where < failures).tolist() == (failed == 1).tolist()


def test_the_expected_gain_in_volume_is_what_sampling_says() -> None:
    measured = [
        Observed(candidate=0, throughput=100.0, peak_bytes=60.0),
        Observed(candidate=1, throughput=50.0, peak_bytes=20.0),
        Observed(candidate=2, throughput=40.0, peak_bytes=30.0),  # beaten by the one before it
        Observed(candidate=3, throughput=500.0, peak_bytes=90.0),  # does not fit
    ]
    front = Front.of(measured, 80.0)
    assert front.levels.tolist() == [0.0, 50.0, 100.0]
    assert front.volume == pytest.approx((40 * 50 + 20 * 100) / 80)
    logs, deviations = np.log([45.0, 70.0, 90.0, 110.0]), np.full(4, 0.2)
    peaks = np.array([10.0, 40.0, 70.0, 79.0])
    draws = np.exp(logs[:, None] + deviations[:, None] * np.random.default_rng(0).normal(size=(4, 200_000)))
    sampled = np.zeros(4)
    for start, end, level in ((0, 20, 0), (20, 60, 50), (60, 80, 100)):
        width = np.maximum(end - np.maximum(start, peaks), 0) / 80
        # As for one objective, the improvement is that of the logarithm, in units of the level.
        excess = np.maximum(np.log(draws) - np.log(level), 0) * level if level else draws
        sampled += width * excess.mean(axis=1)
    assert np.exp(front.log_gain(logs, deviations, peaks)) == pytest.approx(sampled, rel=0.02)


@pytest.mark.parametrize("seed", [0, 4])
def test_a_front_is_widened_towards_little_memory_where_that_is_wanted(seed: int) -> None:
    world = a_world(seed)
    volumes = {}
    for trade in (False, True):
        search, observed = ExpectedImprovement(world.candidates, trade_memory=trade), list[Observed]()
        for _ in range(6):
            proposal = search.propose(observed)
            assert proposal is not None
            observed.append(world.run(proposal.candidate))
        volumes[trade] = Front.of([one for one in observed if one.throughput is not None], CAPACITY).volume
    assert volumes[True] > volumes[False]


Make = Callable[[World], Observed]


@pytest.mark.parametrize(
    "repeated",
    [lambda world: world.run(5), lambda world: Observed(candidate=5, failed=True), lambda world: Observed(candidate=5)],
)
def test_a_candidate_may_be_observed_more_than_once(repeated: Make) -> None:
    world = a_world()
    proposal = ExpectedImprovement(world.candidates).propose([world.run(5), repeated(world), world.run(6)])
    assert proposal is not None
    assert proposal.candidate not in (5, 6)


@pytest.mark.parametrize("at_once", [1, 3])
def test_memory_that_is_predicted_to_the_byte_is_believed(at_once: int) -> None:
    world = a_world(4)
    world = replace(world, candidates=replace(world.candidates, peak_deviation=np.zeros(150)))
    proposals = drive(world, 30, at_once)
    assert not any(world.run(proposal.candidate).ran_out for proposal in proposals)
    contradicted = [Observed(candidate=proposal.candidate, ran_out=True) for proposal in proposals[:5]]
    following = ExpectedImprovement(world.candidates).propose(contradicted)
    assert following is not None
    assert np.isfinite(following.score)


def test_expectations_hold_what_they_say_and_sharpen() -> None:
    covered: dict[int, list[float]] = {0: [], 8: []}
    widths: dict[int, list[float]] = {0: [], 8: []}
    for seed in range(20):
        chance = np.random.default_rng(seed)
        world = a_world(seed, slower=float(np.exp(chance.normal(0, 0.3))))
        for count in covered:
            search = ExpectedImprovement(world.candidates)
            known = chance.choice(len(world.throughput), count, replace=False)
            expected = search.expect([world.run(int(at)) for at in known])
            low, high = expected.throughput_between(0.8)
            inside = (low <= world.throughput) & (world.throughput <= high)
            covered[count].append(float(np.delete(inside, known).mean()))
            widths[count].append(float(np.median(high / low)))
    assert 0.8 <= np.mean(covered[8]) <= 1.0
    assert np.median(widths[8]) < 0.6 * np.median(widths[0])


def test_before_anything_was_observed_the_prediction_is_expected() -> None:
    world = a_world()
    expected = ExpectedImprovement(world.candidates).expect([])
    assert expected.throughput == pytest.approx(world.candidates.throughput, rel=1e-5)
    assert expected.peak_bytes == pytest.approx(world.candidates.peak_bytes, rel=1e-5)
    room = np.log(CAPACITY / world.candidates.peak_bytes)
    assert ((expected.fit_probability > 0.5) == (room > 0)).all()
    low, high = expected.peak_between(0.8)
    assert (np.log(high / low) >= 2 * 1.28 * 0.079).all()  # what axes share among themselves adds a little
