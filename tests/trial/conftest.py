"""Pools on this process's one fork server, which takes seconds to start."""

import os
from collections.abc import Iterator

import pytest

from autotune.trial.pool import NodePool
from tests.trial.gangs import FAULTY, census, fork_family


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, NodePool]]:
    """One with the real engines and one whose engine fails on demand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        logs = str(tmp_path_factory.mktemp("logs"))
        pools = {
            "real": NodePool(device="cpu", log_dir=logs),
            "faulty": NodePool(device="cpu", log_dir=logs, engine=FAULTY),
        }
    for pool in pools.values():
        assert pool.ready()["start_method"] == "forkserver"
    yield pools
    for pool in pools.values():
        pool.shutdown()
    assert not fork_family(os.getpid())


@pytest.fixture
def pool(pools: dict[str, NodePool]) -> NodePool:
    return pools["real"]


@pytest.fixture
def faulty(pools: dict[str, NodePool]) -> Iterator[NodePool]:
    """Checks that a test leaves nothing behind: no process, port, shared memory, thread or file descriptor."""
    before = census()
    yield pools["faulty"]
    assert census() == before
