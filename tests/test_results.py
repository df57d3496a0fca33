"""The ledger: how predictions stand against what trials showed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.results import Best, Result, ledger, pareto_front
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import FailureKind, Outcome
from autotune.spec.prediction import Prediction
from tests.samples import MIB, failure, measurement


def a_config(size: int) -> TrialConfig:
    return TrialConfig(engine="pytorch", gpus=1, micro_batch_size=size, sequence_length=8)


def rows(*pairs: tuple[int, Outcome]) -> tuple[list[Result], dict[TrialConfig, Prediction]]:
    results = [Result(n, a_config(n), outcome) for n, (_, outcome) in enumerate(pairs, 1)]
    predictions = {
        a_config(n): Prediction(device_used_bytes=size * MIB, deviation=0.01) for n, (size, _) in enumerate(pairs, 1)
    }
    return results, predictions


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([128, 256])), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int, int]]) -> None:
    found = [
        Best(n, replace(a_config(n), sequence_length=length), measurement(float(speed), used_bytes=size))
        for n, (speed, size, length) in enumerate(points, 1)
    ]

    def merits(best: Best) -> tuple[float, ...]:
        speed, size, length = points[best.trial - 1]
        return speed, -size, length

    front = pareto_front(found)
    assert [best.measurement.tokens_per_second_per_gpu for best in front] == sorted(
        (best.measurement.tokens_per_second_per_gpu for best in front), reverse=True
    )
    for best in found:
        beaten = any(
            merits(other) != merits(best) and all(a >= b for a, b in zip(merits(other), merits(best), strict=True))
            for other in found
        )
        equal_before = any(merits(other) == merits(best) and other.trial < best.trial for other in found)
        assert (best in front) == (not beaten and not equal_before)


def test_errors_are_of_measured_trials_with_their_sign() -> None:
    results, predictions = rows((44, measurement()), (38, measurement()), (50, failure(FailureKind.CRASH)))
    found = ledger(results, predictions, 56 * MIB)
    assert found.errors == pytest.approx((0.1, -0.05))
    assert found.largest_error == pytest.approx(0.1)
    assert found.median_error == pytest.approx(0.075)
    assert found.surprises == ()


def test_a_surprise_did_not_fit_though_it_should_have() -> None:
    results, predictions = rows(
        (40, failure()),  # predicted to fit, out of memory
        (60, failure()),  # as predicted
        (40, measurement(used_bytes=57 * MIB)),  # no headroom left
        (40, measurement(retries=1)),  # at the limit
        (60, measurement()),  # better than predicted
    )
    assert ledger(results, predictions, 56 * MIB).surprises == (1, 3, 4)


def test_speed_has_its_own_errors_before_the_study_and_at_launch() -> None:
    results, predictions = rows((40, measurement(200.0)), (40, measurement(100.0)), (40, failure()))
    first, second, third = predictions
    predictions[first] = replace(predictions[first], tokens_per_second_per_gpu=300.0)
    expected = replace(predictions[second], tokens_per_second_per_gpu=80.0, proposal={"throughput": 95.0})
    predictions[second] = predictions[third] = expected
    found = ledger(results, predictions, 56 * MIB)
    assert found.speed_errors == pytest.approx((0.5, -0.2))
    assert found.launch_errors == pytest.approx((-0.05,))
    assert (found.median_speed_error, found.median_launch_error) == pytest.approx((0.35, 0.05))


def test_without_predictions_there_is_nothing_to_say() -> None:
    results, _ = rows((40, measurement()))
    found = ledger(results, {}, 56 * MIB)
    assert (found.errors, found.largest_error, found.median_error) == ((), 0.0, 0.0)
