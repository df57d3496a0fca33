"""Sequences of different lengths: how many tokens a step has, and the shapes of its micro-batches."""

import itertools
import math
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.spec.config import Batching, TrialConfig
from autotune.spec.workload import LENGTHS, Workload, lognormal_lengths, typical_lengths


def config(batching: Batching, micro_batch_size: int = 2, sequence_length: int = 8) -> TrialConfig:
    return TrialConfig(
        engine="pytorch",
        gpus=1,
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        batching=batching,
    )


WORK = Workload(global_batch_size=4, lengths=(1, 2, 3, 10))
"""The longest is cut at 8."""


def test_without_lengths_all_have_the_configs() -> None:
    work, fixed = Workload(global_batch_size=4), config("fixed")
    assert work.tokens_per_step(fixed) == 4 * 8
    assert work.largest_shape(fixed) == work.expected_shape(fixed) == (2, 8)


@pytest.mark.parametrize(
    ("batching", "largest", "expected"),
    [("padded", (2, 8), (2, 8)), ("dynamic_padding", (2, 8), (2, 5)), ("packed", (1, 16), (1, 7))],
)
def test_shapes(batching: Batching, largest: tuple[int, int], expected: tuple[int, int]) -> None:
    assert WORK.tokens_per_step(config(batching)) == 4 * 3.5
    assert WORK.largest_shape(config(batching)) == largest
    assert WORK.expected_shape(config(batching)) == expected


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 3))
def test_the_expected_longest_is_the_mean_over_all_batches(lengths: list[int], size: int) -> None:
    work = Workload(global_batch_size=6, lengths=tuple(sorted(lengths)))
    batches = itertools.product(lengths, repeat=size)
    rows, width = work.expected_shape(config("dynamic_padding", size, sequence_length=100))
    assert rows == size
    assert abs(width - fmean(max(batch) for batch in batches)) <= 0.5 + 1e-9


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=3 * LENGTHS))
def test_typical_lengths_keep_the_longest_and_the_middle(lengths: list[int]) -> None:
    found = typical_lengths(lengths)
    assert list(found) == sorted(found)
    assert len(found) == min(LENGTHS, len(lengths))
    assert set(found) <= set(lengths)
    assert found[-1] == max(lengths)


def test_a_lognormal_distribution() -> None:
    found = lognormal_lengths(median=500, sigma=0.8)
    assert list(found) == sorted(found)
    assert median(found) == pytest.approx(500, rel=0.01)
    assert fmean(found) == pytest.approx(500 * math.exp(0.8**2 / 2), rel=0.02)
