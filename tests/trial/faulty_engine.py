"""The real engine, failing on demand. The trial's id says how, when and on which rank: `FAULT.PHASE@RANK`.

RANK may be `all`; what follows it only makes the id unique. Where ids are made by others, as under Ray Tune, the
environment variable FAULTS maps them: `{"0001-1": "sleep.backward@1"}`.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from multiprocessing import shared_memory
from pathlib import Path

import torch
import torch.distributed as dist

from autotune.engines import engine
from autotune.spec.outcome import Phase
from autotune.spec.request import TrialRequest

FAULTY_MICRO_STEP = 2
"""The first one that ends an optimizer step, so that every phase can fail in it and all have a peer that waits."""
IMPATIENCE = timedelta(seconds=2)
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 512.00 MiB."
WATCHDOG = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=4096,"
    " Timeout(ms)=600000) ran for 600029 milliseconds before timing out."
)


class FaultyEngine:
    def __init__(self, request: TrialRequest, device: torch.device) -> None:
        named = json.loads(os.environ.get("FAULTS", "{}")).get(request.trial_id, request.trial_id)
        match = re.match(r"([a-z-]+)\.([a-z]+)@(all|\d+)", named)
        fault, phase, rank = match.groups() if match else ("", "", "")
        self._fault = fault if rank in ("all", str(dist.get_rank())) else ""
        self._impatient = fault == "desert"
        self._swaps_in = request.nvme_path
        self._phase = phase
        self._micro_steps = 0
        if fault == "swap":  # whatever runs: no test of the disk has to build DeepSpeed's op for it
            request = replace(request, config=replace(request.config, offload="none"))
        self._engine = engine.build_engine(request, device)
        self._may_fail(Phase.BUILD)

    def forward(self, input_ids: torch.Tensor, *, boundary: bool, **more: torch.Tensor) -> torch.Tensor:
        self._micro_steps += 1
        self._may_fail(Phase.FORWARD)
        loss = self._engine.forward(input_ids, boundary=boundary, **more)
        return loss * float("inf") if self._fault == "infinite" else loss

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        self._may_fail(Phase.BACKWARD)
        self._engine.backward(loss, boundary=boundary)

    def update(self) -> None:
        self._may_fail(Phase.OPTIMIZER)
        self._engine.update()

    def gradient_norm(self) -> float:
        return self._engine.gradient_norm()

    def _may_fail(self, phase: Phase) -> None:
        if self._phase == phase and (phase is Phase.BUILD or self._micro_steps >= FAULTY_MICRO_STEP):
            if self._impatient:  # all ranks, the one that is left alone too
                for group in dist.distributed_c10d._world.pg_map:  # DeepSpeed makes groups of its own
                    dist.distributed_c10d._set_pg_timeout(IMPATIENCE, group)
            self._fail()

    def _fail(self) -> None:
        match self._fault:
            case "oom":
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            case "late-oom":  # the peer sees the connections close before this rank has said why
                dist.destroy_process_group()
                time.sleep(0.15)
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            case "hoard":
                self._hoard = [torch.zeros(1 << 20) for _ in range(1000)]
            case "host-hoard":
                self._host_hoard = bytearray(1 << 44)
            case "compile":  # killed while it compiles an extension
                lock = _scratch() / "cpu_adam" / "lock"
                lock.parent.mkdir()
                lock.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            case "share":  # and then one rank fails and the other has no time to unlink
                self._segment = shared_memory.SharedMemory(f"nccl-{os.getpid()}", create=True, size=4096)
                if dist.get_rank() == 0:
                    raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            case "grandchildren":  # the second one as torchrun starts its workers
                for new_session in (False, True):
                    subprocess.Popen(["sleep", "1000"], start_new_session=new_session)
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            case "kernel-kill":
                (_scratch() / "memory.events").write_text("oom_kill 1\n")
                os.kill(os.getpid(), signal.SIGKILL)
            case "swap":  # killed with files on the disk, as what swaps there has them
                (Path(self._swaps_in or "") / f"rank{dist.get_rank()}.swp").write_bytes(b"states")
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segv":
                ctypes.string_at(0)
            case "abort":
                os.abort()
            case "watchdog":
                sys.stderr.write(WATCHDOG + "\n")
                os.abort()
            case "exit":
                os._exit(3)
            case "sleep" | "desert":
                sys.stderr.write("asleep\n")
                time.sleep(1000)
            case "doze":
                time.sleep(2)
            case "slow":
                time.sleep(0.2)
            case "refuse":
                raise ValueError("this combination is not supported")
            case "bug":
                raise KeyError("no such layer")


def _scratch() -> Path:
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def build_engine(request: TrialRequest, device: torch.device) -> FaultyEngine:
    return FaultyEngine(request, device)
