"""A run that confirms a config: whole optimizer steps, then what a training job also does.

Nothing is composed here: an optimizer step runs with all its micro-steps. Where lengths differ, the warm-up has had the
longest batch. The evaluation pass has the micro-batch of training. The checkpoint is written beside the rank's log, and
deleted.
"""

import math
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from autotune.engines.batches import MicroBatch
from autotune.engines.engine import Engine
from autotune.spec.outcome import LongRun, Phase
from autotune.spec.workload import LongRunSettings
from autotune.trial.failure import NonFiniteLossError
from autotune.trial.gpu_health import Watch
from autotune.trial.measure import Batch

CHECKPOINT_BYTES_PER_PARAMETER = 18
"""At most: fp32 masters and both of Adam's states are 12, weights and gradients kept with them 6. Asked of the disk
beforehand, since one that fills up takes more than this trial with it."""


@dataclass(slots=True)
class WholeSteps:
    """What one rank saw of its steps, the first one left out of `seconds` and `allocated_bytes`."""

    seconds: list[float]
    allocated_bytes: list[int]
    losses: list[float]
    """Of every micro-step, the first step's included."""
    tokens: list[int] = field(default_factory=list)
    """Of each step in `seconds`, padding left out."""


def run_whole_steps(
    engine: Engine,
    settings: LongRunSettings,
    accumulation: int,
    *,
    batch: Batch,
    first_step: int,
    synchronize: Callable[[], None],
    barrier: Callable[[], None],
    on_phase: Callable[[Phase], None],
    live_bytes: Callable[[], int],
    after_step: Callable[[], None],
) -> WholeSteps:
    """Run one step more than `settings.steps` and time each, from the moment every rank is ready to the last kernel.

    Args:
        engine: a rank's engine, warmed up.
        settings: how many.
        accumulation: micro-steps of a step.
        batch: makes the inputs; not timed, since a training job loads them ahead.
        first_step: index of the first optimizer step.
        synchronize: waits for the device.
        barrier: waits for all ranks.
        on_phase: told before each phase.
        live_bytes: of the device, asked after each step.
        after_step: called after each step, not timed.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite.
    """
    found = WholeSteps([], [], [])
    for step in range(first_step, first_step + settings.steps + 1):
        inputs = [batch(step, micro_step) for micro_step in range(accumulation)]
        losses: list[torch.Tensor] = []
        barrier()
        synchronize()
        started = time.perf_counter()
        for micro_step, given in enumerate(inputs):
            boundary = micro_step == accumulation - 1
            on_phase(Phase.FORWARD)
            loss = engine.forward(given.input_ids, boundary=boundary, **given.more)
            on_phase(Phase.BACKWARD)
            engine.backward(loss, boundary=boundary)
            losses.append(loss.detach())
            del loss
        on_phase(Phase.OPTIMIZER)
        engine.update()
        synchronize()
        seconds = time.perf_counter() - started
        found.losses += [loss.item() for loss in losses]
        if not all(math.isfinite(loss) for loss in found.losses[-accumulation:]):
            raise NonFiniteLossError(f"a loss in optimizer step {step} is not finite: {found.losses[-accumulation:]}")
        tokens = sum(given.tokens for given in inputs)
        del inputs, given, losses
        if step > first_step:
            found.seconds.append(seconds)
            found.tokens.append(tokens)
            found.allocated_bytes.append(live_bytes())
        after_step()
    return found


def evaluate(
    engine: Engine, inputs: MicroBatch, *, synchronize: Callable[[], None], barrier: Callable[[], None]
) -> float:
    """Seconds of one forward pass without gradients."""
    barrier()
    synchronize()
    started = time.perf_counter()
    engine.evaluate(inputs.input_ids, **inputs.more)
    synchronize()
    return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Saved:
    """What came of a checkpoint."""

    seconds: float | None = None
    size: int = 0
    skipped: str | None = None


def save_and_delete(engine: Engine, folder: Path, num_parameters: int, *, first_of_node: bool) -> Saved:
    """Write a checkpoint, unless the disk has too little room for it on some node.

    Args:
        engine: a rank's engine; every rank calls this.
        folder: where, on each node; made and removed.
        num_parameters: of the whole model.
        first_of_node: whether this rank makes and removes the folder of its node.
    """
    if first_of_node:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    free = shutil.disk_usage(folder).free
    needed = CHECKPOINT_BYTES_PER_PARAMETER * num_parameters
    device = "cuda" if torch.cuda.is_initialized() else "cpu"  # type: ignore[no-untyped-call]  # torch has not annotated it
    ratio = torch.tensor(free / needed, device=device)
    dist.all_reduce(ratio, dist.ReduceOp.MIN)
    saved = Saved(
        skipped=f"it may take {needed / 1e9:.1f} GB, and a node has {ratio.item() * needed / 1e9:.1f} GB free"
    )
    if ratio.item() > 1:
        started = time.perf_counter()
        engine.save(folder)
        dist.barrier()
        seconds = time.perf_counter() - started
        files = [path for path in folder.rglob("*") if path.is_file()] if first_of_node else []
        saved = Saved(seconds=seconds, size=sum(path.stat().st_size for path in files))
        dist.barrier()
    if first_of_node:
        shutil.rmtree(folder, ignore_errors=True)
    return saved


def long_run(steps: WholeSteps, watch: Watch, evaluation_seconds: float | None, saved: Saved) -> LongRun:
    """All of it as a rank reports it."""
    return LongRun(
        step_seconds=tuple(steps.seconds),
        step_tokens=tuple(steps.tokens),
        allocated_bytes=tuple(steps.allocated_bytes),
        evaluation_seconds=evaluation_seconds,
        checkpoint_seconds=saved.seconds,
        checkpoint_bytes=saved.size,
        checkpoint_skipped=saved.skipped,
        host=socket.gethostname(),
        gpu=watch.health(),
    )
