"""An engine of one matrix that fails on demand: the trial's id says how, and on which rank, `FAULT@RANK`.

Its ranks depend on each other as real ones do: gradients are averaged in every boundary's backward pass.
"""

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist

from autotune.spec.request import TrialRequest

FAULTY_MICRO_STEP = 3


class FaultyEngine:
    def __init__(self, request: TrialRequest, device: torch.device) -> None:
        fault, _, rank = request.trial_id.partition("@")
        self._fault = fault if rank == str(dist.get_rank()) else ""
        self._micro_steps = 0
        self._norm = 0.0
        self._weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
        if self._fault == "refuse":
            raise ValueError("this combination is not supported")
        if self._fault == "build-oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(self, input_ids: torch.Tensor, *, boundary: bool) -> torch.Tensor:
        self._micro_steps += 1
        if self._micro_steps == FAULTY_MICRO_STEP:
            self._fail()
        if self._fault == "slow":
            time.sleep(0.2)
        rows = input_ids[:, :64].to(self._weight.dtype)
        loss = (rows @ self._weight).square().mean()
        return loss * float("nan") if self._fault == "nan" and self._micro_steps >= FAULTY_MICRO_STEP else loss

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        torch.autograd.backward(loss)
        if boundary:
            dist.all_reduce(self._weight.grad)

    def update(self) -> None:
        assert self._weight.grad is not None
        self._norm = self._weight.grad.norm().item()
        self._weight.grad = None

    def gradient_norm(self) -> float:
        return self._norm

    def _fail(self) -> None:
        match self._fault:
            case "oom":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB.")
            case "slow-oom":  # the peer sees the connections close before this rank has said why
                dist.destroy_process_group()
                time.sleep(0.15)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB.")
            case "build":  # killed while it compiles an extension
                lock = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam" / "lock"
                lock.parent.mkdir()
                lock.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            case "grandchild":
                subprocess.Popen(["sleep", "1000"])
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB.")
            case "allocate":
                self._hoard = [torch.zeros(1 << 20) for _ in range(1000)]
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segv":
                ctypes.string_at(0)
            case "exit":
                os._exit(3)
            case "sleep":
                time.sleep(1000)
            case "bug":
                raise KeyError("no such layer")


def build_engine(request: TrialRequest, device: torch.device) -> FaultyEngine:
    return FaultyEngine(request, device)
