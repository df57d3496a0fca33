"""The measuring protocol: which micro-steps run, and how each is timed.

An optimizer step of g micro-steps is g - 1 that only accumulate and one that updates. A screening trial does not run
steps whole: it samples both kinds of micro-step and `compose` adds them up. It can, because an engine is told by a
flag, not by counting, which micro-step ends a step (`autotune.engines.engine`).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from autotune.engines.batches import MicroBatch
from autotune.engines.engine import Engine
from autotune.spec.outcome import Phase
from autotune.trial.failure import NonFiniteLossError

Batch = Callable[[int, int], MicroBatch]
"""(optimizer step, micro-step) -> what the rank is given, on the device."""


def warmup_plan(accumulation: int, cycles: int) -> tuple[bool, ...]:
    """The micro-steps of the warm-up, True where an update ends one.

    One micro-step of each kind a cycle suffices: the update allocates Adam's state, and each kind tunes its kernels and
    opens its communicators.
    """
    return ((False, True) if accumulation > 1 else (True,)) * cycles


def measure_plan(accumulation: int, micro_steps: int) -> tuple[bool, ...]:
    """The measured micro-steps, True where an update ends one: at least two updates, spread evenly, one at the end.

    No run of accumulating micro-steps is longer than in a real optimizer step. Where there is accumulation, at least
    one sample is of it: `micro_steps` is raised to three if need be, and to two without accumulation.
    """
    total = max(micro_steps, 3 if accumulation > 1 else 2)
    updates = max(2, math.ceil(total / accumulation))
    return tuple((i + 1) * updates // total > i * updates // total for i in range(total))


@dataclass(slots=True)
class Samples:
    """What one rank timed, in order."""

    micro_step_seconds: list[float] = field(default_factory=list)
    update_step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    micro_step_tokens: list[int] = field(default_factory=list)
    update_step_tokens: list[int] = field(default_factory=list)
    stopped_early: bool = False


def run_micro_steps(
    engine: Engine,
    plan: tuple[bool, ...],
    *,
    batch: Batch,
    first_step: int,
    synchronize: Callable[[], None],
    barrier: Callable[[], None],
    on_phase: Callable[[Phase], None],
    after_sample: Callable[[], None] = lambda: None,
    hopeless: Callable[[Samples], bool] = lambda samples: False,
) -> Samples:
    """Run the micro-steps of a plan and time each, from the moment every rank is ready to the device's last kernel.

    Args:
        engine: a rank's engine.
        plan: see `warmup_plan` and `measure_plan`.
        batch: makes the inputs; not timed, since a training job loads them ahead.
        first_step: index of the first optimizer step, so that warm-up and measurement see different data.
        synchronize: waits for the device.
        barrier: waits for all ranks, so that none is charged for another's lateness in the sample before.
        on_phase: told before each phase.
        after_sample: called after each micro-step, not timed.
        hopeless: asked after each micro-step but the last, not timed; whether to leave out the rest. Must say the same
            on every rank.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite.
    """
    samples = Samples()
    step, micro_step = first_step, 0
    for number, boundary in enumerate(plan, 1):
        inputs = batch(step, micro_step)
        barrier()
        synchronize()
        started = time.perf_counter()
        on_phase(Phase.FORWARD)
        loss = engine.forward(inputs.input_ids, boundary=boundary, **inputs.more)
        on_phase(Phase.BACKWARD)
        engine.backward(loss, boundary=boundary)
        if boundary:
            on_phase(Phase.OPTIMIZER)
            engine.update()
        synchronize()
        seconds = time.perf_counter() - started
        (samples.update_step_seconds if boundary else samples.micro_step_seconds).append(seconds)
        (samples.update_step_tokens if boundary else samples.micro_step_tokens).append(inputs.tokens)
        samples.losses.append(loss.item())
        if not math.isfinite(samples.losses[-1]):
            raise NonFiniteLossError(
                f"the loss is {samples.losses[-1]} in optimizer step {step}, micro-step {micro_step}"
            )
        del loss, inputs  # else the last graph's leftovers count in the next sample's peak
        after_sample()
        if number < len(plan) and hopeless(samples):
            samples.stopped_early = True
            break
        step, micro_step = (step + 1, 0) if boundary else (step, micro_step + 1)
    return samples
