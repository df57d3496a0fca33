"""Runs that confirm, on the real engines: whole steps, an evaluation pass, a checkpoint that is gone afterwards."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from autotune.engines.batches import MicroBatch
from autotune.spec.cluster import find_gpu
from autotune.spec.config import Engine
from autotune.spec.outcome import outcome_from_dict
from autotune.spec.workload import LongRunSettings
from autotune.trial.child import CHECKPOINT
from autotune.trial.compose import compose
from autotune.trial.failure import NonFiniteLossError
from autotune.trial.gpu_health import GpuWatch
from autotune.trial.long_run import WholeSteps, run_whole_steps, save_and_delete
from autotune.trial.pool import NodePool
from tests.trial.gangs import a_request, run
from tests.trial.recorder import Recorder


@pytest.mark.parametrize(("engine", "zero_stage"), [("pytorch", 3), ("deepspeed", 2)])
def test_whole_steps_an_evaluation_and_a_checkpoint(pool: NodePool, engine: Engine, zero_stage: int) -> None:
    settings = LongRunSettings(steps=3, evaluate=True, save=True)
    request = a_request(f"long-{engine}", engine=engine, zero_stage=zero_stage, long_run=settings)
    found = run(pool, request)
    assert found.failure is None, found.failure
    measured = compose(found.ranks, request, find_gpu("cpu"))
    assert measured.confirms
    assert outcome_from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    for rank in found.ranks:
        assert rank.long_run is not None
        assert len(rank.long_run.step_seconds) == len(rank.long_run.allocated_bytes) == 3
        assert measured.step_time_seconds >= sum(rank.long_run.step_seconds) / 3
        assert rank.long_run.evaluation_seconds is not None
        assert rank.long_run.checkpoint_seconds is not None
        assert rank.peak_memory_allocated_bytes >= max(rank.long_run.allocated_bytes)
        # 16 sequences, 2 a rank and pass: 4 micro-steps a step, of 4 steps; and 2 that warm up.
        assert len(rank.losses) == 4 * 4 + 2
        assert rank.update_step_seconds == ()
    first = found.ranks[0].long_run
    assert first is not None
    # fp32 weights and both of Adam's states are 12 bytes a parameter, somewhere among the ranks' files.
    assert first.checkpoint_bytes > 12 * request.model.num_parameters
    assert found.log_path is not None
    assert not (Path(found.log_path).parent / CHECKPOINT).exists()


def test_a_disk_without_room_is_said_and_no_failure(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        saved = save_and_delete(Recorder(), tmp_path / "checkpoint", 10**15, first_of_node=True)
    finally:
        dist.destroy_process_group()
    assert (saved.seconds, saved.size) == (None, 0)
    assert str(saved.skipped).startswith("it may take 18000000.0 GB, and a node has ")
    assert not (tmp_path / "checkpoint").exists()


def steps_of(engine: Recorder, steps: int) -> WholeSteps:
    sizes = itertools.count(100)
    return run_whole_steps(
        engine,
        LongRunSettings(steps=steps),
        2,
        batch=lambda step, micro_step: MicroBatch(torch.tensor(10 * step + micro_step), 7),
        first_step=1,
        synchronize=lambda: None,
        barrier=lambda: engine.calls.append("barrier"),
        on_phase=lambda phase: None,
        live_bytes=lambda: next(sizes),
        after_step=lambda: engine.calls.append("after"),
    )


def test_steps_are_whole_and_the_first_one_is_left_out() -> None:
    engine = Recorder()
    found = steps_of(engine, 1)
    one = ["barrier", "forward {0}0 False", "backward False", "forward {0}1 True", "backward True", "update", "after"]
    assert engine.calls == [word.format(step) for step in (1, 2) for word in one]
    assert (len(found.seconds), found.allocated_bytes, len(found.losses)) == (1, [100], 4)


def test_a_loss_that_is_not_finite_ends_it() -> None:
    with pytest.raises(NonFiniteLossError, match="optimizer step 2"):
        steps_of(Recorder([1.0, 1.0, 1.0, float("nan")]), 3)


def test_what_the_driver_says_of_a_gpu() -> None:
    answers = iter([(0x4 | 0x1, 60, 1980), (0x40, 82, 1200)])
    now: list[tuple[int, int, int]] = []

    def ask(index: int) -> Any:
        if index == 0:
            now[:] = [next(answers)]
        return now[0][index]

    nvml = SimpleNamespace(
        NVML_TEMPERATURE_GPU=0,
        NVML_CLOCK_SM=1,
        NVMLError=RuntimeError,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: ask(0),
        nvmlDeviceGetTemperature=lambda handle, sensor: ask(1),
        nvmlDeviceGetClockInfo=lambda handle, clock: ask(2),
    )
    watch = GpuWatch(nvml, object())
    assert watch.health() is None
    watch.sample()
    watch.sample()
    health = watch.health()
    assert health is not None
    assert (health.lowest_clock_mhz, health.highest_clock_mhz, health.hottest_celsius) == (1200, 1980, 82)
    assert health.throttle_reasons == ("sw_power_cap", "hw_thermal_slowdown")
