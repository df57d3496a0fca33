"""`Session`: a trial as the process of the user's script sees it. It measures, and ends the process when it is enough.

It begins with `import autotune`, so that errors while the model is built are told apart too, and so that on CPU the
memory limit holds from there on. The other end is `autotune.trial.script`.
"""

import contextlib
import faulthandler
import gc
import math
import multiprocessing
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any

from autotune.spec.outcome import GpuHealth, LongRun, Phase, RankMeasurement
from autotune.spec.request import TrialRequest
from autotune.trial.child import SCRIPT_VARIABLE, STACKS_SIGNAL, Reporter, Seat, script_socket
from autotune.trial.compose import least_step_seconds
from autotune.trial.failure import NonFiniteLossError, classify

if TYPE_CHECKING:
    import torch

    from autotune.trial.device_memory import DeviceMemory

NO_CHECKPOINT = "the script saves its own"

_session: "Session | None" = None


class ScriptRefusesError(ValueError):
    """The script does not run what the candidate says."""


def begin() -> None:
    """Join the trial that this process was started for. Workers of a data loader, which import us again, do not."""
    global _session
    folder = os.environ.get(SCRIPT_VARIABLE)
    if not folder or multiprocessing.parent_process() is not None:
        return
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):  # a process that a rank has started, too
        channel = Client(script_socket(folder, int(os.environ.get("LOCAL_RANK", "0"))), family="AF_UNIX")
        _session = Session(channel, *channel.recv())


def current() -> "Session | None":
    """The trial that this process runs in; None where there is none."""
    return _session


def report_step(
    loss: "float | torch.Tensor | None" = None,
    tokens: "int | torch.Tensor | None" = None,
    *,
    accumulating: bool = False,
) -> None:
    """Tell the trial that a step is over. Outside a trial it does nothing.

    Call it on every rank after each optimizer step; with `accumulation: short` also after each forward and backward
    pass that only accumulates, with `accumulating=True`. When enough is measured the process ends here, with exit
    code 0 and without running what would follow: a trial saves nothing.

    Args:
        loss: of the step, to be checked for being finite; None is not checked.
        tokens: that this rank trained on since the last call, padding left out; None: as many as the workload says.
        accumulating: the optimizer has not stepped yet.
    """
    if _session is not None:
        _session.report(boundary=not accumulating, loss=loss, tokens=tokens)


@dataclass(slots=True)
class _Samples:
    """What was timed, in order."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, seconds: float, tokens: int | None) -> None:
        self.seconds.append(seconds)
        if tokens is not None:
            self.tokens.append(tokens)


class Session:
    """One rank's trial inside the script.

    Args:
        channel: to the rank.
        seat: where this process sits.
        request: the trial.
    """

    def __init__(self, channel: Connection, seat: Seat, request: TrialRequest) -> None:
        self.request = request
        self._channel, self._seat = channel, seat
        self._reporter = Reporter(channel.send, seat.started)
        self._reporter.enter_stage("build", Phase.BUILD)
        self._memory: DeviceMemory | None = None
        self._since: float | None = None
        self._pass_tokens: list[int] = []
        self._passes = 0
        self._steps = 0
        self._micro, self._updates, self._whole = _Samples(), _Samples(), _Samples()
        self._losses: list[float] = []
        self._live_bytes: list[int] = []
        self._watch: Any = None
        faulthandler.enable()
        faulthandler.register(STACKS_SIGNAL)
        self._excepthook, sys.excepthook = sys.excepthook, self._failed
        threading.Thread(target=self._end_with_the_rank, name="autotune-watch", daemon=True).start()
        if request.device == "cpu":
            self._limit_memory()

    def begin_training(self) -> None:
        """The first forward pass is about to begin: peaks of building are forgotten, and silence means a hang."""
        self.memory.begin()
        self.enter_phase(Phase.FORWARD, stage="warmup")

    def enter_phase(self, phase: Phase, stage: str = "") -> None:
        """The script enters a phase, of a new stage if one is named."""
        if self._memory is not None:
            self._memory.enter_phase(phase)
        if stage:
            self._reporter.enter_stage(stage, phase)
        else:
            self._reporter.enter_phase(phase)

    def start_clock(self) -> None:
        """A step begins now: what went before it, such as loading data, is not timed."""
        self._synchronize()
        self._since = time.perf_counter()

    def refuse(self, reason: str) -> None:
        """End the trial: the script does something else than the candidate says."""
        self._fail(ScriptRefusesError(reason), Phase.BUILD)

    @property
    def memory(self) -> "DeviceMemory":
        """Of the device that the script computes on."""
        if self._memory is None:
            import torch

            from autotune.trial.device_memory import device_memory

            self._memory = device_memory(torch.device("cuda", torch.cuda.current_device()), None)
        return self._memory

    def report(
        self, *, boundary: bool, loss: "float | torch.Tensor | None", tokens: "int | torch.Tensor | None"
    ) -> None:
        """See `report_step`."""
        self._synchronize()
        now = time.perf_counter()
        self._passes += 1
        if loss is not None:
            self._check_loss(float(loss))
        if tokens is not None:
            self._pass_tokens.append(int(tokens))
        self.memory.sample()
        self._check_passes(boundary=boundary)
        self._sample(None if self._since is None else now - self._since, boundary=boundary)
        if boundary:
            self._steps += 1
            self._passes = 0
            if self._steps == self.request.measure.warmup:
                self.enter_phase(Phase.FORWARD, stage="measure")
        self._end_if_enough()
        self.enter_phase(Phase.FORWARD)
        if not self._is_whole or boundary:
            self.start_clock()

    @property
    def _is_whole(self) -> bool:
        """Whether optimizer steps are timed as one."""
        request = self.request
        return request.long_run is not None or (request.script is not None and request.script.accumulation == "whole")

    def _sample(self, seconds: float | None, *, boundary: bool) -> None:
        """Keep what was timed since the clock was started, unless it warms up."""
        if self._is_whole and not boundary:
            return
        tokens = sum(self._pass_tokens) if self._pass_tokens else None
        self._pass_tokens.clear()
        if self._steps < self.request.measure.warmup or seconds is None:
            return
        if self.request.long_run is not None:
            self._whole.add(seconds, tokens)
            self._live_bytes.append(self.memory.live_bytes())
            self._health.sample()
        else:
            (self._updates if boundary else self._micro).add(seconds, tokens)

    def _check_passes(self, *, boundary: bool) -> None:
        """Refuse a script that accumulates over another number of micro-steps than its candidate."""
        expected, script = self.request.accumulation, self.request.script
        if script is None or script.accumulation == "whole":
            return
        if self._passes == expected if boundary else self._passes < expected:
            return
        if boundary and self._passes == 1:
            remedy = "report each with report_step(accumulating=True), or say script.accumulation: whole"
        else:
            remedy = "pass it {gradient_accumulation_steps} or {training_args}"
        self.refuse(
            f"the script has reported {self._passes} micro-steps of an optimizer step"
            f" {'in all' if boundary else 'and goes on'}, but the trial's has {expected}; {remedy}"
        )

    def _check_loss(self, loss: float) -> None:
        self._losses.append(loss)
        if not math.isfinite(loss):
            self._fail(NonFiniteLossError(f"the loss is {loss} in optimizer step {self._steps}"))

    def _end_if_enough(self) -> None:
        request = self.request
        if request.long_run is not None:
            enough, stopped = len(self._whole.seconds) > request.long_run.steps, False
        else:
            accumulation = 1 if self._is_whole else request.accumulation
            wanted = max(2, math.ceil(max(request.measure.micro_steps, 2) / accumulation))
            enough = len(self._updates.seconds) >= wanted
            stopped = not enough and self._is_hopeless()
        if enough or stopped:
            self._channel.send(self._measurement(stopped_early=stopped))
            self._leave(0)

    def _is_hopeless(self) -> bool:
        """Whether some rank is too slow already; all ranks ask together."""
        limit = self.request.most_step_seconds
        if limit is None or not (self._micro.seconds or self._updates.seconds):
            return False
        least = least_step_seconds(self._micro.seconds, self._updates.seconds, self.request.timed_micro_steps)
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            return self._seat.world_size == 1 and least > limit
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        verdict = torch.tensor(float(least > limit), device=device)
        dist.all_reduce(verdict, dist.ReduceOp.MAX)
        return bool(verdict.item())

    def _measurement(self, *, stopped_early: bool) -> RankMeasurement:
        from autotune.trial.environment import environment

        peaks = self.memory.peaks()
        return RankMeasurement(
            rank=self._seat.rank,
            micro_step_seconds=tuple(self._micro.seconds),
            update_step_seconds=tuple(self._updates.seconds),
            micro_step_tokens=tuple(self._micro.tokens),
            update_step_tokens=tuple(self._updates.tokens),
            losses=tuple(self._losses),
            peak_memory_allocated_bytes=peaks.allocated_bytes,
            peak_memory_reserved_bytes=peaks.reserved_bytes,
            peak_device_used_bytes=peaks.device_used_bytes,
            device_memory_bytes=peaks.device_bytes,
            allocator_retries=peaks.allocator_retries,
            phase_seconds=self._reporter.phase_seconds,
            environment=environment(self.request.device),
            long_run=None if self.request.long_run is None else self._long_run(self._health.health()),
            stopped_early=stopped_early,
        )

    def _long_run(self, health: GpuHealth | None) -> LongRun:
        return LongRun(
            step_seconds=tuple(self._whole.seconds[1:]),
            step_tokens=tuple(self._whole.tokens[1:]),
            allocated_bytes=tuple(self._live_bytes[1:]),
            evaluation_seconds=None,
            checkpoint_seconds=None,
            checkpoint_bytes=0,
            checkpoint_skipped=NO_CHECKPOINT if self.request.long_run and self.request.long_run.save else None,
            host=socket.gethostname(),
            gpu=health,
        )

    @property
    def _health(self) -> Any:
        if self._watch is None:
            import torch

            from autotune.trial.gpu_health import watch_gpu

            self._watch = watch_gpu(torch.device(self.request.device))
        return self._watch

    def _synchronize(self) -> None:
        if self.request.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _limit_memory(self) -> None:
        """Count the tensors that live, and from now on refuse what a device of the given size would."""
        import torch

        from autotune.trial.device_memory import CpuMemory

        self._memory = CpuMemory(self.request.memory_limit_bytes)
        self._memory.__enter__()  # until the process ends
        self._memory.track(found for found in gc.get_objects() if issubclass(type(found), torch.Tensor))

    def _fail(self, error: Exception, phase: Phase | None = None) -> None:
        """End the process with a verdict; what the script would make of the exception does not matter."""
        print(f"autotune: {error}", file=sys.stderr)  # noqa: T201 the rank's log
        self._send_verdict(error, phase)
        self._leave(1)

    def _failed(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        """`sys.excepthook`: the script is about to end with an exception."""
        self._send_verdict(error)
        self._excepthook(kind, error, traceback)

    def _send_verdict(self, error: BaseException, phase: Phase | None = None) -> None:
        with contextlib.suppress(OSError):  # the rank is gone, and the trial with it
            at = phase or self._reporter.phase
            self._channel.send(classify(error, rank=self._seat.rank, phase=at, device=self.request.device))

    def _leave(self, code: int) -> None:
        if code == 0:
            dist = sys.modules.get("torch.distributed")
            # A peer must not see connections close while it needs them; one that fails now has its own verdict.
            with contextlib.suppress(Exception):
                if dist is not None and dist.is_initialized():
                    dist.barrier()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)  # not what would follow in the script: it may save, evaluate, or wait for ranks that are gone

    def _end_with_the_rank(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._channel.recv()
        os._exit(1)
