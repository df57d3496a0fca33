"""A message holds memory until it has arrived, and no longer, whatever torch.distributed still keeps of it."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from autotune.modeling import messages
from autotune.modeling.memory_tracker import MemoryTracker

BYTES = 4000


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


COLLECTIVES: dict[str, Callable[[torch.Tensor], dist.Work | None]] = {
    "all_gather": lambda tensor: dist.all_gather_into_tensor(torch.empty_like(tensor), tensor, async_op=True),
    "all_to_all": lambda tensor: dist.all_to_all_single(torch.empty_like(tensor), tensor, async_op=True),
    "broadcast": lambda tensor: dist.broadcast(tensor, 0, async_op=True),
}


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_what_has_arrived_is_held_by_nobody(collective: str, alone: None) -> None:
    with MemoryTracker() as tracker:
        work = COLLECTIVES[collective](torch.ones(BYTES // 4))  # it keeps its tensors, as one of gloo's threads does
        assert work is not None
        work.wait()
        assert tracker.live_bytes == 0
    del work


DTENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all_gather": lambda tensor: torch.ops._c10d_functional.all_gather_into_tensor(tensor, 1, group_name()),
    "all_reduce": lambda tensor: torch.ops._c10d_functional.all_reduce(tensor, "sum", group_name()),
}


def group_name() -> str:
    return dist.distributed_c10d._get_default_group().group_name


@pytest.mark.parametrize("collective", DTENSORS)
def test_nor_is_what_dtensor_has_waited_for(collective: str, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[dist.Work] = []  # as one of gloo's threads holds it

    def hold(result: torch.Tensor, work: dist.Work) -> None:
        held.append(work)
        torch._C._distributed_c10d._register_work(result, work)

    monkeypatch.setattr(messages, "_register_work", hold)
    with MemoryTracker() as tracker:
        result = DTENSORS[collective](torch.arange(BYTES // 4))
        waited = torch.ops._c10d_functional.wait_tensor(result)
        assert waited.tolist() == list(range(BYTES // 4))
        assert tracker.live_bytes == BYTES * 2  # `arange` gives integers of eight bytes
        del result, waited
        assert tracker.live_bytes == 0
    assert len(held) == 1
    assert torch._C._distributed_c10d._get_work_registry_size() == 0


def test_results_are_written_where_the_caller_looks(alone: None) -> None:
    with MemoryTracker() as tracker:
        gathered = torch.zeros(4, 2)
        rows = gathered[1:3]  # neither at the storage's start nor all of it
        dist.all_gather_into_tensor(rows, torch.arange(4.0).view(2, 2))
        summed = torch.tensor([1, 2, 3])
        dist.all_reduce(summed)
        assert tracker.live_bytes == 8 * 4 + 3 * 8
    assert gathered.tolist() == [[0, 0], [0, 1], [2, 3], [0, 0]]
    assert summed.tolist() == [1, 2, 3]


def test_the_copy_that_gloo_makes_for_a_reduce_scatter_is_not_counted(alone: None) -> None:
    with MemoryTracker() as tracker:
        whole, part = torch.ones(BYTES // 4), torch.zeros(BYTES // 4)
        work = dist.reduce_scatter_tensor(part, whole, async_op=True)
        assert work is not None
        work.wait()
        assert (tracker.live_bytes, tracker.peak_bytes) == (2 * BYTES, 2 * BYTES)
        assert part.sum() == BYTES // 4
    del work


def late_partner(store: str, told: Connection) -> None:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.FileStore(store, 2), rank=1, world_size=2)
    told.recv()
    dist.all_gather_into_tensor(torch.empty(2 * BYTES // 4), torch.full((BYTES // 4,), 2.0))
    dist.barrier()
    dist.destroy_process_group()


def test_what_is_on_its_way_counts_though_the_caller_has_dropped_it(tmp_path: Path) -> None:
    tell, told = multiprocessing.Pipe()
    store = str(tmp_path / "store")
    partner = multiprocessing.get_context("spawn").Process(target=late_partner, args=(store, told))
    partner.start()
    try:
        dist.init_process_group("gloo", store=torch._C._distributed_c10d.FileStore(store, 2), rank=0, world_size=2)
        with MemoryTracker() as tracker:
            gathered = torch.empty(2 * BYTES // 4)
            work = dist.all_gather_into_tensor(gathered, torch.ones(BYTES // 4), async_op=True)
            time.sleep(0.1)
            assert tracker.live_bytes == 3 * BYTES
            tell.send("go")
            work.wait()
            assert tracker.live_bytes == 2 * BYTES
            assert gathered[-1] == 2
        dist.barrier()
        dist.destroy_process_group()
    finally:
        partner.join(20)
        partner.kill()
