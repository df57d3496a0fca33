"""Ranks that serve all tests of the engines: importing what they need costs more than most tests."""

from collections.abc import Iterator

import pytest

from tests.engines.parity import Ranks, RankServer


@pytest.fixture(scope="session")
def server() -> Iterator[RankServer]:
    server = RankServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def ranks(server: RankServer) -> Ranks:
    return Ranks(server, 2)


@pytest.fixture(scope="session")
def four_ranks(server: RankServer) -> Ranks:
    return Ranks(server, 4)


@pytest.fixture(scope="session")
def eight_ranks(server: RankServer) -> Ranks:
    return Ranks(server, 8)
