"""A rank: process group, memory, engine, measurement."""

import contextlib
import importlib
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from autotune.engines.batches import micro_batch
from autotune.engines.engine import Engine
from autotune.spec.outcome import Phase, RankMeasurement
from autotune.spec.request import TrialRequest
from autotune.trial.child import Reporter, Seat
from autotune.trial.device_memory import DeviceMemory, await_free_device, device_memory
from autotune.trial.environment import environment
from autotune.trial.measure import Samples, measure_plan, run_micro_steps, warmup_plan

GROUP_TIMEOUT_RATIO = 0.9
"""Of the trial's deadline. A net: the parent sees a hang earlier, and must see the deadline later. Groups that a
library makes for itself (DeepSpeed does) have PyTorch's default instead, so only the parent can be relied on."""


def run_rank(seat: Seat, request: TrialRequest, engine: str, reporter: Reporter) -> RankMeasurement:
    """Run the trial as one rank of its gang, in a fresh process that ends afterwards.

    Args:
        seat: where this rank sits; RANK, MASTER_ADDR and the like are in the environment already.
        request: the trial.
        engine: `module:function` with the signature of `autotune.engines.engine.build_engine`.
        reporter: is told of each phase.

    Raises:
        Exception: whatever ends the rank; `autotune.trial.failure` knows what it means.
    """
    device = _device(seat, request)
    memory = device_memory(device, request.memory_limit_bytes)
    build = _resolve(engine)
    _join_group(request, device)

    def enter_phase(phase: Phase) -> None:
        memory.enter_phase(phase)
        reporter.enter_phase(phase)

    with memory:
        memory.enter_phase(Phase.BUILD)
        reporter.enter_stage("build", Phase.BUILD)
        built = build(request, device)
        dist.barrier()  # The parent bears silence from a rank that builds, not from others that wait for it.
        warmup, measured = _measure(built, seat, request, device, memory, reporter, enter_phase)
        peaks = memory.peaks()
    return RankMeasurement(
        rank=seat.rank,
        micro_step_seconds=tuple(measured.micro_step_seconds),
        update_step_seconds=tuple(measured.update_step_seconds),
        losses=tuple(warmup.losses + measured.losses),
        peak_memory_allocated_bytes=peaks.allocated_bytes,
        peak_memory_reserved_bytes=peaks.reserved_bytes,
        peak_device_used_bytes=peaks.device_used_bytes,
        device_memory_bytes=peaks.device_bytes,
        allocator_retries=peaks.allocator_retries,
        phase_seconds=reporter.phase_seconds,
        environment=environment(request.device),
    )


def leave_group() -> None:
    """Close the connections after every rank's last collective: a peer must not see them close while it needs them."""
    with contextlib.suppress(Exception):  # the result is delivered; a peer that fails now has its own verdict
        dist.barrier()
        dist.destroy_process_group()


def _device(seat: Seat, request: TrialRequest) -> torch.device:
    if request.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", seat.local_rank)
    torch.cuda.set_device(device)
    await_free_device(lambda: torch.cuda.mem_get_info(device))
    # Offloaded optimizers run on the host's cores, which the ranks of a node share.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // seat.local_world_size))
    return device


def _join_group(request: TrialRequest, device: torch.device) -> None:
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=GROUP_TIMEOUT_RATIO * request.timeout_seconds),
        # Opens NCCL's communicator now, so that its memory and time are not taken for the model's.
        device_id=device if device.type == "cuda" else None,
    )


def _resolve(engine: str) -> Callable[[TrialRequest, torch.device], Engine]:
    module, _, function = engine.partition(":")
    build: Callable[[TrialRequest, torch.device], Engine] = getattr(importlib.import_module(module), function)
    return build


def _measure(
    engine: Engine,
    seat: Seat,
    request: TrialRequest,
    device: torch.device,
    memory: DeviceMemory,
    reporter: Reporter,
    enter_phase: Callable[[Phase], None],
) -> tuple[Samples, Samples]:
    """Warm up, then measure: the samples of both."""
    accumulation = request.workload.micro_steps(request.config)

    def batch(step: int, micro_step: int) -> torch.Tensor:
        tokens = micro_batch(
            request.config,
            request.workload,
            request.model.vocab_size,
            step=step,
            micro_step=micro_step,
            rank=seat.rank,
        )
        return tokens.to(device)

    def run(plan: tuple[bool, ...], first_step: int) -> Samples:
        return run_micro_steps(
            engine,
            plan,
            batch=batch,
            first_step=first_step,
            synchronize=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
            barrier=dist.barrier,
            on_phase=enter_phase,
            after_sample=memory.sample,
        )

    memory.begin()
    reporter.enter_stage("warmup", Phase.FORWARD)
    warmup = run(warmup_plan(accumulation, request.measure.warmup), first_step=0)
    reporter.enter_stage("measure", Phase.FORWARD)
    return warmup, run(measure_plan(accumulation, request.measure.micro_steps), first_step=request.measure.warmup)
