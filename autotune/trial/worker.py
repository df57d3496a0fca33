"""A rank: process group, memory, engine, measurement."""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from autotune.engines.batches import MicroBatch, inputs
from autotune.engines.engine import Engine
from autotune.spec.outcome import Phase, RankMeasurement
from autotune.spec.request import TrialRequest
from autotune.spec.workload import LongRunSettings
from autotune.trial.child import CHECKPOINT, Reporter, Seat
from autotune.trial.compose import least_step_seconds
from autotune.trial.device_memory import DeviceMemory, await_free_device, device_memory
from autotune.trial.environment import environment
from autotune.trial.gpu_health import NoWatch, watch_gpu
from autotune.trial.long_run import (
    Saved,
    WholeSteps,
    evaluate,
    long_run,
    run_whole_steps,
    save_and_delete,
)
from autotune.trial.measure import Samples, measure_plan, run_micro_steps, warmup_plan
from autotune.trial.script import await_exit, run_script

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
    if request.script is not None:
        return run_script(seat, request, request.script, reporter)
    device, *more = devices = _devices(seat, request)
    memory = device_memory(device, request.memory_limit_bytes, *more)
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
        run = _Run(built, seat, request, devices, memory, enter_phase)
        memory.begin()
        reporter.enter_stage("warmup", Phase.FORWARD)
        warmup = run.warm_up()
        reporter.enter_stage("measure", Phase.FORWARD)
        measured, long = Samples(), None
        if request.long_run is None:
            plan = measure_plan(run.accumulation, request.measure.micro_steps)
            measured = run.micro_steps(plan, first_step=run.first_step, hopeless=run.is_hopeless)
        else:
            steps, evaluation_seconds = run.whole_steps(request.long_run)
            measured = Samples(losses=steps.losses)
    if request.long_run is not None:
        # Out of the tracker's sight: on CPU it would take what is copied to be written for the device's.
        saved = Saved()
        if request.long_run.save:
            enter_phase(Phase.SAVE)
            folder = Path(seat.log_path).parent / CHECKPOINT
            saved = save_and_delete(built, folder, request.model.num_parameters, first_of_node=seat.local_rank == 0)
        long = long_run(steps, run.watch, evaluation_seconds, saved)
    peaks = memory.peaks()
    return RankMeasurement(
        rank=seat.rank,
        micro_step_seconds=tuple(measured.micro_step_seconds),
        update_step_seconds=tuple(measured.update_step_seconds),
        micro_step_tokens=tuple(measured.micro_step_tokens),
        update_step_tokens=tuple(measured.update_step_tokens),
        losses=tuple(warmup.losses + measured.losses),
        peak_memory_allocated_bytes=peaks.allocated_bytes,
        peak_memory_reserved_bytes=peaks.reserved_bytes,
        peak_device_used_bytes=peaks.device_used_bytes,
        device_memory_bytes=peaks.device_bytes,
        allocator_retries=peaks.allocator_retries,
        phase_seconds=reporter.phase_seconds,
        environment=environment(request.device),
        long_run=long,
        stopped_early=measured.stopped_early,
    )


def leave_group() -> None:
    """Close the connections after every rank's last collective: a peer must not see them close while it needs them."""
    await_exit()
    with contextlib.suppress(Exception):  # the result is delivered; a peer that fails now has its own verdict
        dist.barrier()
        dist.destroy_process_group()


def _devices(seat: Seat, request: TrialRequest) -> list[torch.device]:
    """Those of this rank, of which the first is current."""
    if request.device == "cpu":
        return [torch.device("cpu")]
    count = request.config.gpus_per_rank
    devices = [torch.device("cuda", seat.local_rank * count + at) for at in range(count)]
    torch.cuda.set_device(devices[0])
    for device in devices:
        await_free_device(functools.partial(torch.cuda.mem_get_info, device))
    # Offloaded optimizers run on the host's cores, which the ranks of a node share.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // seat.local_world_size))
    return devices


def _synchronize(devices: list[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _join_group(request: TrialRequest, device: torch.device) -> None:
    dist.init_process_group(
        backend=_backend(request, device),
        timeout=timedelta(seconds=GROUP_TIMEOUT_RATIO * request.timeout_seconds),
        # Opens NCCL's communicator now, so that its memory and time are not taken for the model's.
        device_id=device if device.type == "cuda" else None,
    )


def _backend(request: TrialRequest, device: torch.device) -> str:
    if device.type == "cpu":
        return "gloo"
    # FSDP2 leaves offloaded gradients on the host, where their norm is summed.
    on_host = request.config.engine == "pytorch" and request.config.offload != "none"
    return "cuda:nccl,cpu:gloo" if on_host else "nccl"


def _resolve(engine: str) -> Callable[[TrialRequest, torch.device], Engine]:
    module, _, function = engine.partition(":")
    build: Callable[[TrialRequest, torch.device], Engine] = getattr(importlib.import_module(module), function)
    return build


class _Run:
    """What this rank runs on its engine."""

    def __init__(
        self,
        engine: Engine,
        seat: Seat,
        request: TrialRequest,
        devices: list[torch.device],
        memory: DeviceMemory,
        enter_phase: Callable[[Phase], None],
    ) -> None:
        self.accumulation = request.workload.micro_steps(request.config)
        # Of several devices the first is watched: they work in turn.
        self.watch = watch_gpu(devices[0]) if request.long_run is not None else NoWatch()
        self._engine, self._seat, self._request, self._device = engine, seat, request, devices[0]
        self._memory, self._enter_phase = memory, enter_phase
        self._synchronize = functools.partial(_synchronize, devices)

    @property
    def first_step(self) -> int:
        """That is measured."""
        return self._request.measure.warmup + int(self._lengths_differ)

    def warm_up(self) -> Samples:
        """Full optimizer cycles, and where lengths differ one more, whose batches are the longest: with all states
        there, its peak is the highest that training reaches.
        """
        return self.micro_steps(warmup_plan(self.accumulation, self.first_step), first_step=0)

    def micro_steps(
        self, plan: tuple[bool, ...], first_step: int, hopeless: Callable[[Samples], bool] = lambda samples: False
    ) -> Samples:
        """See `autotune.trial.measure.run_micro_steps`."""
        return run_micro_steps(
            self._engine,
            plan,
            batch=self._batch,
            first_step=first_step,
            synchronize=self._synchronize,
            barrier=dist.barrier,
            on_phase=self._enter_phase,
            after_sample=self._memory.sample,
            hopeless=hopeless,
        )

    def is_hopeless(self, samples: Samples) -> bool:
        """Whether some rank alone is too slow already: a step is as long as on the slowest. All ranks ask together."""
        limit = self._request.most_step_seconds
        if limit is None:
            return False
        least = least_step_seconds(samples.micro_step_seconds, samples.update_step_seconds, self.accumulation)
        verdict = torch.tensor(float(least > limit), device=self._device)
        dist.all_reduce(verdict, dist.ReduceOp.MAX)
        return bool(verdict.item())

    def whole_steps(self, settings: LongRunSettings) -> tuple[WholeSteps, float | None]:
        """The steps, and the seconds of the evaluation pass if there is one."""
        steps = run_whole_steps(
            self._engine,
            settings,
            self.accumulation,
            batch=self._batch,
            first_step=self.first_step,
            synchronize=self._synchronize,
            barrier=dist.barrier,
            on_phase=self._enter_phase,
            live_bytes=self._memory.live_bytes,
            after_step=self._after_step,
        )
        if not settings.evaluate:
            return steps, None
        self._enter_phase(Phase.EVALUATE)
        given = self._batch(self.first_step, 0)
        seconds = evaluate(self._engine, given, synchronize=self._synchronize, barrier=dist.barrier)
        self._memory.sample()
        return steps, seconds

    def _after_step(self) -> None:
        self.watch.sample()
        self._memory.sample()

    def _batch(self, step: int, micro_step: int) -> MicroBatch:
        request = self._request
        found = inputs(
            request.config,
            request.workload,
            request.model.vocab_size,
            step=step,
            micro_step=micro_step,
            rank=self._seat.rank,
            longest=self._lengths_differ and step == request.measure.warmup,
        )
        return found.to(self._device)

    @property
    def _lengths_differ(self) -> bool:
        return self._request.config.batching != "fixed"
