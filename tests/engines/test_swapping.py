"""Optimizer states on a disk: trained like a plain loop, or refused where DeepSpeed would train on wrong gradients.

What runs DeepSpeed's op `async_io` builds it first, for minutes, unless an earlier run has.
"""

import ctypes
import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotune.engines import swapping
from autotune.engines.engine import build_engine
from autotune.engines.swapping import reads_to_any_address, require_aligned_gradients, require_locked_memory
from autotune.errors import UsageError
from autotune.formats.deepspeed_json import async_io_error
from autotune.spec.config import Offload
from autotune.spec.model import ModelSpec
from autotune.spec.nvme import (
    AHEAD_KEYS,
    FEWEST_PARAMETER_BUFFERS,
    PARAMETER_BUFFER_KEY,
    PARAMETER_BUFFERS_KEY,
    STORED_BYTES,
    largest_partition,
    stored_bytes,
)
from autotune.spec.request import TrialRequest
from tests.engines.parity import SMALL_BUCKETS, Ranks, assert_equal, plain_training, request, tiny, train

BUILD_SECONDS = 1200


def model(head_dim: int) -> ModelSpec:
    """Partitions of 1 MiB and more, which are swapped. With 16, norms of heads are no multiple of a disk's block."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "head_dim": head_dim}
    return ModelSpec(name="wide-qwen3", config=tiny().config | wide)


def swapping_trial(folder: Path, head_dim: int, **fields: Any) -> TrialRequest:
    trial = request("deepspeed", 3, **{"model": model(head_dim), "offload": "optimizer_nvme", **fields})
    return replace(trial, nvme_path=str(folder))


def all_swapped(tied: bool) -> ModelSpec:
    """A model with an embedding that is swapped too, as all matrices are."""
    sizes = {"hidden_size": 2048, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 256}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return ModelSpec(name="all-swapped-qwen3", config=tiny(tied).config | sizes | heads)


def all_on_disk(folder: Path, keys: dict[str, int], tied: bool = False, **fields: Any) -> TrialRequest:
    spec = all_swapped(tied)
    small = {key: value for key, value in SMALL_BUCKETS if key not in AHEAD_KEYS}
    given = small | {PARAMETER_BUFFER_KEY: largest_partition(spec, 2)} | keys
    return swapping_trial(folder, 0, model=spec, offload="optimizer_nvme+parameters_nvme", deepspeed=given, **fields)


def at(trial: TrialRequest, offload: Offload) -> TrialRequest:
    return replace(trial, config=replace(trial.config, offload=offload))


def written(folder: Path, pattern: str = "*.swp") -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern))


@pytest.fixture
def async_io() -> None:
    if reason := async_io_error():
        pytest.skip(reason)


@pytest.fixture(params=["/dev/shm", None], ids=["memory", "disk"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """On a file system that reads to any address, where Linux has one that does, and where temporary files go."""
    with tempfile.TemporaryDirectory(prefix="autotune-test-", dir=request.param) as made:
        yield Path(made)


@pytest.mark.slow
@pytest.mark.usefixtures("async_io")
class TestTraining:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"activation_checkpointing": "full", "micro_batch_size": 1},
            {"deepspeed": dict(SMALL_BUCKETS) | {"zero_optimization.sub_group_size": 600_000}},
        ],
        ids=["plain", "checkpointing", "sub-groups"],
    )
    def test_equals_a_plain_loop(self, ranks: Ranks, folder: Path, fields: dict[str, Any]) -> None:
        trial = swapping_trial(folder, 256, **fields)
        for trace in ranks.run(train, trial, build_engine, seconds=BUILD_SECONDS):
            assert_equal(trace, plain_training(trial.model))
        assert 12 < written(folder) / trial.model.num_parameters <= STORED_BYTES

    def test_in_bf16(self, ranks: Ranks, folder: Path) -> None:
        trial = swapping_trial(folder, 256, precision="bf16")
        for trace in ranks.run(train, trial, build_engine, seconds=BUILD_SECONDS):
            assert_equal(trace, plain_training(trial.model), loss_rtol=1e-3, norm_rtol=2e-2)

    @pytest.mark.parametrize(
        ("fields", "keys"),
        [
            ({}, {}),
            ({"micro_batch_size": 1, "activation_checkpointing": "full"}, {}),
            ({"activation_checkpointing": "selective", "selective_every": 2}, {}),
            ({}, {"zero_optimization.sub_group_size": 4_000_000}),
            ({"tied": True}, {PARAMETER_BUFFERS_KEY: FEWEST_PARAMETER_BUFFERS}),
        ],
        ids=["plain", "checkpointing", "selective", "sub-groups", "fewest-buffers"],
    )
    def test_parameters_too_equal_a_plain_loop(
        self, ranks: Ranks, folder: Path, fields: dict[str, Any], keys: dict[str, int]
    ) -> None:
        trial = all_on_disk(folder, keys, **fields)
        for trace in ranks.run(train, trial, build_engine, seconds=BUILD_SECONDS):
            assert_equal(trace, plain_training(trial.model))
        assert written(folder, "*_param.tensor.swp") > 0.99 * 4 * trial.model.num_parameters
        assert 0.99 < written(folder) / stored_bytes(trial.config, trial.model, 2) <= 1

    def test_parameters_in_main_memory_equal_a_plain_loop(self, ranks: Ranks, folder: Path) -> None:
        trial = swapping_trial(folder, 256, offload="optimizer_nvme+parameters")
        for trace in ranks.run(train, trial, build_engine, seconds=BUILD_SECONDS):
            assert_equal(trace, plain_training(trial.model))

    def test_in_bf16_it_is_the_same_wherever_parameters_are(self, ranks: Ranks, folder: Path) -> None:
        on_disk = all_on_disk(folder, {}, precision="bf16")
        trials = [on_disk, at(on_disk, "optimizer_nvme+parameters"), at(on_disk, "optimizer_nvme")]
        first, *others = (ranks.run(train, trial, build_engine, seconds=BUILD_SECONDS)[0] for trial in trials)
        for other in others:
            assert_equal(other, first)

    def test_gradients_between_blocks_are_right_or_refused(self, ranks: Ranks, folder: Path) -> None:
        """Where the disk refuses the address, DeepSpeed goes on with a norm that is 5 % off in the second step."""
        trial = swapping_trial(folder, 16)
        if reads_to_any_address(folder):
            for trace in ranks.run(train, trial, build_engine, seconds=BUILD_SECONDS):
                assert_equal(trace, plain_training(trial.model))
        else:
            with pytest.raises(AssertionError, match="memory aligned to 512 bytes"):
                ranks.run(train, trial, build_engine, seconds=BUILD_SECONDS)


@pytest.mark.parametrize("alignment", [4, 512])
def test_a_disk_is_asked_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alignment: int) -> None:
    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if ctypes.addressof(ctypes.c_char.from_buffer(buffers[0])) % alignment:
            raise OSError(errno.EINVAL, "Invalid argument")
        return len(buffers[0])

    monkeypatch.setattr(os, "O_DIRECT", 0)  # not every file system knows it
    monkeypatch.setattr(os, "pwritev", lambda descriptor, buffers, offset: len(buffers[0]))
    monkeypatch.setattr(os, "preadv", preadv)
    assert reads_to_any_address(tmp_path) == (alignment == 4)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_reads_takes_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwritev", refuse)
    assert not reads_to_any_address(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ([300_000, 128, 300_032], False),  # the last begins within a block
        ([300_032, 128, 300_032], True),
        ([128, 300_032, 16, 16], True),  # what is not swapped may lie anywhere
        ([16, 300_032], False),
    ],
)
def test_only_swapped_gradients_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], fits: bool
) -> None:
    monkeypatch.setattr(swapping, "reads_to_any_address", lambda folder: False)
    positions = {at: [0, sum(sizes[:at]), size] for at, size in enumerate(sizes)}
    swapper = SimpleNamespace(is_swappable_tensor=lambda numel: 4 * numel >= 1024**2)
    optimizer = SimpleNamespace(grad_position=positions, optimizer_swapper=swapper)
    if fits:
        require_aligned_gradients(optimizer, tmp_path)
    else:
        with pytest.raises(UsageError, match="another number of GPUs"):
            require_aligned_gradients(optimizer, tmp_path)
    monkeypatch.setattr(swapping, "reads_to_any_address", lambda folder: True)
    require_aligned_gradients(optimizer, tmp_path)


def test_more_memory_than_may_be_locked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "_may_lock_all", lambda: False)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * 1024**2, 8 * 1024**2))
    require_locked_memory(8 * 1024**2)
    with pytest.raises(UsageError, match=r"locks 16\.0 MiB of memory a rank, and the limit is 8\.0 MiB"):
        require_locked_memory(16 * 1024**2)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    require_locked_memory(16 * 1024**2)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, 0))
    monkeypatch.setattr(swapping, "_may_lock_all", lambda: True)
    require_locked_memory(16 * 1024**2)
