"""A trial that is one process for several GPUs, through the pool, on a CPU in their place."""

import pytest

from autotune.spec.cluster import find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Measurement
from autotune.spec.request import TrialRequest
from autotune.spec.workload import MeasureSettings, Workload
from autotune.trial.compose import conclude
from autotune.trial.pool import NodePool
from tests.engines.parity import tiny


def test_its_throughput_counts_all_gpus(pool: NodePool) -> None:
    adapters = {"method": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
    config = TrialConfig.from_dict(
        {"engine": "pytorch", "gpus": 2, "device_map": "auto", "micro_batch_size": 2, "sequence_length": 16, **adapters}
    )
    request = TrialRequest(
        trial_id="spread",
        model=tiny(),
        workload=Workload(global_batch_size=4),
        config=config,
        device="cpu",
        measure=MeasureSettings(micro_steps=3),
    )
    result = pool.run(
        request, ranks=[0], world_size=config.ranks, master_address="127.0.0.1", master_port=pool.free_port()
    )
    assert result.failure is None
    (rank,) = result.ranks
    measured = conclude(result.ranks, request, find_gpu("cpu"))
    assert isinstance(measured, Measurement)
    tokens = 4 * 16 / measured.step_time_seconds / 2
    assert measured.tokens_per_second_per_gpu == pytest.approx(tokens)
    assert len(rank.losses) >= 4
