"""Ranks that serve all tests of the engines: starting them costs more than most tests."""

from collections.abc import Iterator

import pytest

from tests.engines.parity import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    yield from started(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    yield from started(4)


@pytest.fixture(scope="session")
def eight_ranks() -> Iterator[Ranks]:
    yield from started(8)


def started(count: int) -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DS_ACCELERATOR", "cpu")
        environment.setenv("OMP_NUM_THREADS", "1")
        ranks = Ranks(count)
    yield ranks
    ranks.stop()
