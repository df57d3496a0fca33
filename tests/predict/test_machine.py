"""The self-benchmark: its figures, and how they are kept and read."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import UnknownHardwareError
from autotune.predict import machine, self_benchmark
from autotune.predict.machine import MachineRates, machine_rates
from tests.predict.samples import RATES


@given(st.floats(1, 1e12), st.floats(1.01, 100))
def test_more_work_takes_longer_or_as_long(size: float, factor: float) -> None:
    less, more = RATES.seconds("product", "fp32", np.array([size, factor * size]))
    assert 0 < less <= more <= less * factor * 1.0001  # no measured curve here is steeper than a line


def test_beyond_what_was_measured_work_is_in_proportion() -> None:
    found = RATES.seconds("product", "bf16", np.array([1.0, 1e4, 1e8, 1e9]))
    assert found == pytest.approx([2e-6, 2e-6, 1e-2, 1e-1])


def test_an_unknown_dtype_is_timed_as_fp32_and_collectives_by_bytes() -> None:
    size = np.array([3e5])
    assert RATES.seconds("moved", "other", size) == RATES.seconds("moved", "fp32", size)
    assert RATES.seconds("all_reduce", "bytes", size) > 3e-4


def test_figures_are_measured_once_for_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[tuple[int, tuple[str, ...]]] = []

    def measured(ranks: int, dtypes: tuple[str, ...]) -> MachineRates:
        asked.append((ranks, dtypes))
        return RATES

    monkeypatch.setattr(machine, "measure", measured)
    said: list[None] = []
    assert machine_rates(2, ["bf16"], lambda: said.append(None)) == RATES
    assert machine_rates(2, ["bf16", "fp32"], lambda: said.append(None)) == RATES
    assert len(said) == 1
    assert machine_rates(4, ["bf16"]) == RATES
    assert asked == [(2, ("bf16", "fp32")), (4, ("bf16", "fp32"))]
    (file, _) = sorted((tmp_path / "autotune" / "machine").iterdir())
    file.write_text("{")  # cut off by a full disk
    assert machine_rates(2, ["bf16"]) == machine_rates(4, ["bf16"]) == RATES


def test_more_ranks_than_cores_can_stand_for_are_refused() -> None:
    with pytest.raises(UnknownHardwareError, match="10000 ranks cannot be timed"):
        machine.measure(10_000, ("fp32",))


def test_a_rank_measures_all_that_a_step_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_benchmark, "ROUND_SECONDS", 1e-3)
    monkeypatch.setattr(self_benchmark, "PRODUCT_SIDES", (32, 256))
    threads = torch.get_num_threads()
    try:
        found = self_benchmark.run_rank(0, 1, ("bf16", "fp32"), str(tmp_path / "meeting"))
    finally:
        torch.set_num_threads(threads)
    assert not dist.is_initialized()
    assert MachineRates.from_dict(found.to_dict()) == found
    assert 1e-7 < found.call_seconds < 1e-3
    assert found.sharded_call_seconds > found.call_seconds
    assert set(found.work) == set(RATES.work)
    for of in found.work.values():
        for curve in of.values():
            sizes, seconds = np.array(curve).T
            assert (np.diff(sizes) > 0).all()
            assert (seconds > 0).all()
    small, large = found.work["product"]["fp32"]
    assert large[1] > small[1]
