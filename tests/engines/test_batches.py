"""Any split over ranks and micro-batches sees the same global batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autotune.engines.batches import micro_batch, sequence
from autotune.spec.config import TrialConfig
from autotune.spec.workload import Workload

VOCAB = 1000


def config(gpus: int, micro_batch_size: int) -> TrialConfig:
    return TrialConfig(engine="pytorch", gpus=gpus, micro_batch_size=micro_batch_size, sequence_length=8)


def global_batch(gpus: int, micro_batch_size: int, step: int) -> list[tuple[int, ...]]:
    workload = Workload(global_batch_size=16, seed=7)
    split = config(gpus, micro_batch_size)
    rows = []
    for micro_step in range(workload.gradient_accumulation_steps(split)):
        for rank in range(gpus):
            ids = micro_batch(split, workload, VOCAB, step=step, micro_step=micro_step, rank=rank)
            assert ids.shape == (micro_batch_size, 8)
            assert ids.dtype == torch.int64
            rows += [tuple(row) for row in ids.tolist()]
    return rows


@given(gpus=st.sampled_from([1, 2, 4]), micro_batch_size=st.sampled_from([1, 2, 4]), step=st.integers(0, 3))
def test_every_split_is_the_same_global_batch_in_order(gpus: int, micro_batch_size: int, step: int) -> None:
    whole = [tuple(sequence(7, step, index, 8, VOCAB).tolist()) for index in range(16)]
    assert global_batch(gpus, micro_batch_size, step) == whole


def test_seed_step_and_index_all_matter() -> None:
    rows = [sequence(seed, step, index, 32, VOCAB) for seed in (1, 2) for step in (0, 1) for index in (0, 1)]
    assert len({row.tobytes() for row in rows}) == 8


def test_tokens_are_uniform_over_the_vocabulary() -> None:
    counts = torch.bincount(torch.from_numpy(sequence(1, 0, 0, 100_000, 10)), minlength=10)
    assert counts.min() > 9_500
    assert counts.max() < 10_500


def test_tokens_never_change() -> None:
    """A stored measurement is compared with one of next year."""
    assert sequence(1, 0, 0, 6, 1000).tolist() == [420, 66, 173, 79, 7, 5]


def test_a_micro_step_outside_the_optimizer_step_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_step 2 is outside an optimizer step of 2 micro-steps"):
        micro_batch(config(2, 4), Workload(global_batch_size=16), VOCAB, step=0, micro_step=2, rank=0)
