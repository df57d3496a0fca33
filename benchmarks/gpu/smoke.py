"""Do trials work on this machine's GPU? Every way a trial can end, for real, in a few minutes and without a download.

    python benchmarks/gpu/smoke.py [--device cuda|cpu] [--json]

Checks, on one GPU with NCCL and one rank:

- The fork server imports everything and leaves CUDA alone; a forked rank runs kernels.
- Five configs of a small Qwen3, on both engines, stages 0 to 3, with and without checkpointing, are measured.
- A config that cannot fit is an out-of-memory failure, and its memory is free again afterwards.
- A rank that is killed is a crash, a rank that stands still is a hang, and nothing is left of either.

With --json the last line is one object: hardware, date, versions and all results. Exit code 1 if a check failed.
"""

import argparse
import dataclasses
import datetime
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from autotune.spec.cluster import find_gpu, identify_gpu
from autotune.spec.config import ActivationCheckpointing, TrialConfig
from autotune.spec.model import load_model
from autotune.spec.outcome import FailureKind, Measurement
from autotune.spec.request import DeviceType, TrialRequest
from autotune.spec.workload import MeasureSettings, Workload
from autotune.trial.compose import compose
from autotune.trial.gang import GangResult, wait_for
from autotune.trial.pool import NodePool
from autotune.units import MIB, format_bytes, format_rate, format_seconds

MEMORY_TOLERANCE_BYTES = 64 * MIB
"""What counts as nothing: other processes of the machine come and go."""
FREE_SECONDS = 2.0
"""How long the driver may take to give back what a dead process had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What differs between a GPU and a CPU."""

    device: DeviceType
    model: str
    sequence_length: int
    memory_limit_bytes: int | None
    too_large_micro_batch: int
    bucket_size: int
    start_seconds: float
    """After this long a rank is certainly alive."""
    stall_seconds: float


SETTINGS = {
    "cuda": Setting(
        device="cuda",
        model="Qwen/Qwen3-0.6B",
        sequence_length=1024,
        memory_limit_bytes=None,
        too_large_micro_batch=4096,  # the logits alone: 4096 x 1024 x 151936 x 2 bytes = 1.2 TB
        bucket_size=500_000_000,
        start_seconds=10,
        stall_seconds=20,
    ),
    "cpu": Setting(
        device="cpu",
        model="qwen3-tiny",
        sequence_length=64,
        memory_limit_bytes=200 * MIB,
        too_large_micro_batch=512,
        bucket_size=1_000_000,
        start_seconds=2,
        stall_seconds=4,
    ),
}


class Smoke:
    """Runs the checks and keeps their results."""

    def __init__(self, setting: Setting, log_dir: str) -> None:
        self.setting = setting
        self.checks: list[dict[str, Any]] = []
        self.trials: list[dict[str, Any]] = []
        started = time.monotonic()
        self.pool = NodePool(device=setting.device, log_dir=log_dir)
        self.ready = self.pool.ready()
        self.warm_up_seconds = time.monotonic() - started

    def run(self) -> None:
        """All checks."""
        self.check(
            "the fork server leaves CUDA alone", self.ready["start_method"] == "forkserver", self.ready["reason"]
        )
        before = self.used_bytes()
        for config in self.configs():
            self.measure(config)
        self.out_of_memory(before)
        self.struck(signal.SIGKILL, FailureKind.CRASH, "a killed rank is a crash")
        self.struck(signal.SIGSTOP, FailureKind.HANG, "a rank that stands still is a hang")
        self.check(
            "its memory is free again", self.is_free(before), f"{format_bytes(self.used_bytes() - before)} more in use"
        )
        self.check("no process is left", len(self.ranks()) == 0, f"{len(self.ranks())} ranks")

    def configs(self) -> Iterator[TrialConfig]:
        """Five that cover both engines, all stages and checkpointing."""
        # torch's AdamW needs no compiler on the machine, which DeepSpeed's own does.
        plain = (("optimizer.params.torch_adam", True),)
        buckets = tuple(
            (f"zero_optimization.{key}", self.setting.bucket_size)
            for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
        )
        first = TrialConfig(
            engine="pytorch", gpus=1, micro_batch_size=1, sequence_length=self.setting.sequence_length, precision="bf16"
        )
        yield first
        yield dataclasses.replace(first, zero_stage=3, activation_checkpointing="full")
        for stage in (1, 2, 3):
            checkpointing: ActivationCheckpointing = "full" if stage > 1 else "none"
            yield dataclasses.replace(
                first,
                engine="deepspeed",
                zero_stage=stage,
                activation_checkpointing=checkpointing,
                deepspeed=plain + buckets,
            )

    def request(self, name: str, config: TrialConfig, **changes: Any) -> TrialRequest:
        """A trial of two micro-steps per optimizer step."""
        request = TrialRequest(
            trial_id=name,
            model=load_model(self.setting.model, Path.cwd()),
            workload=Workload(global_batch_size=2 * config.micro_batch_size),
            config=config,
            device=self.setting.device,
            memory_limit_bytes=self.setting.memory_limit_bytes,
            timeout_seconds=120,
            stall_seconds=60,
        )
        return dataclasses.replace(request, **changes)

    def start(self, request: TrialRequest) -> GangResult:
        """Run a trial of one rank on the first GPU."""
        return self.pool.run(
            request, ranks=[0], world_size=1, master_address="127.0.0.1", master_port=self.pool.free_port()
        )

    def measure(self, config: TrialConfig) -> None:
        """Run a config and keep its measurement."""
        request = self.request(f"config-{len(self.trials)}", config)
        started = time.monotonic()
        result = self.start(request)
        seconds = time.monotonic() - started
        self.check(f"{config.describe()} is measured", result.failure is None, self.why(result))
        if result.failure is not None:
            return
        rank = result.ranks[0]
        known = identify_gpu(rank.environment["device"], rank.device_memory_bytes)
        measurement = compose(result.ranks, request, known or find_gpu("cpu"))
        self.trials.append({"config": config.to_dict(), "seconds": seconds, **measurement.to_dict()})
        self.say(config, measurement, seconds)

    def out_of_memory(self, before: int) -> None:
        """A config that no device can hold."""
        config = dataclasses.replace(next(self.configs()), micro_batch_size=self.setting.too_large_micro_batch)
        started = time.monotonic()
        result = self.start(self.request("too-large", config))
        seconds = time.monotonic() - started
        kind = result.failure and result.failure.kind
        asked = result.failure and result.failure.requested_bytes
        self.check(
            "what cannot fit is out of memory",
            kind is FailureKind.OUT_OF_MEMORY and asked is not None,
            f"{self.why(result)}; {format_seconds(seconds)} in all",
        )
        self.check(
            "its memory is free again", self.is_free(before), f"{format_bytes(self.used_bytes() - before)} more in use"
        )

    def struck(self, number: signal.Signals, kind: FailureKind, name: str) -> None:
        """A trial whose rank gets a signal."""
        results: list[GangResult] = []
        request = self.request(
            f"struck-by-{number.name}",
            next(self.configs()),
            measure=MeasureSettings(micro_steps=1_000_000),
            stall_seconds=self.setting.stall_seconds,
        )
        thread = threading.Thread(target=lambda: results.append(self.start(request)))
        thread.start()
        time.sleep(self.setting.start_seconds)
        ranks = self.ranks()
        for rank in ranks:
            os.kill(rank.pid, number)
        started = time.monotonic()
        thread.join()
        found = results[0].failure and results[0].failure.kind
        seconds = format_seconds(time.monotonic() - started)
        self.check(name, bool(ranks) and found is kind, f"{self.why(results[0])}; gone after {seconds}")

    def ranks(self) -> list[psutil.Process]:
        """Processes that the fork server has now."""
        children = psutil.Process().children(recursive=True)
        servers = [process for process in psutil.Process().children() if "forkserver" in " ".join(process.cmdline())]
        return [process for process in children if process.ppid() in {server.pid for server in servers}]

    def used_bytes(self) -> int:
        """Bytes of the device in use by everyone, this process's own constant context included."""
        if self.setting.device == "cpu":
            return sum(process.memory_info().rss for process in self.ranks())
        import torch

        free, total = torch.cuda.mem_get_info(0)
        return total - free

    def is_free(self, before: int) -> bool:
        """Whether no more is in use than before, or soon."""
        return wait_for(lambda: self.used_bytes() <= before + MEMORY_TOLERANCE_BYTES, FREE_SECONDS)

    def check(self, name: str, passed: bool, detail: str) -> None:
        """Keep and print one result."""
        self.checks.append({"check": name, "passed": passed, "detail": detail})
        print(f"{'ok  ' if passed else 'FAIL'}  {name}: {detail}", flush=True)

    def say(self, config: TrialConfig, measurement: Measurement, seconds: float) -> None:
        """Print one row of the table."""
        print(
            f"      {format_bytes(measurement.peak_memory_allocated_bytes):>10} allocated"
            f" {format_bytes(measurement.peak_memory_reserved_bytes):>10} reserved"
            f" {format_bytes(measurement.peak_device_used_bytes):>10} used"
            f" {format_rate(measurement.tokens_per_second_per_gpu):>8} tokens/s"
            f"  step {format_seconds(measurement.step_time_seconds)}, trial {format_seconds(seconds)}"
        )

    @staticmethod
    def why(result: GangResult) -> str:
        """The outcome in one line."""
        if result.failure is None:
            return ", ".join(f"{phase} {format_seconds(value)}" for phase, value in result.phase_seconds.items())
        return f"{result.failure.kind} in {result.failure.phase}: {result.failure.message.splitlines()[0][:200]}"

    def report(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "benchmark": "gpu/smoke",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "setting": dataclasses.asdict(self.setting),
            "environment": self.trials[0]["ranks"][0]["environment"] if self.trials else {},
            "warm_up_seconds": self.warm_up_seconds,
            "passed": all(check["passed"] for check in self.checks),
            "checks": self.checks,
            "trials": self.trials,
        }


def main() -> int:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", choices=SETTINGS, default="cuda")
    arguments.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = arguments.parse_args()
    if options.device == "cuda" and not list(Path("/dev").glob("nvidia[0-9]*")):
        arguments.error("no NVIDIA GPU on this machine; --device cpu runs the same checks without one")
    with tempfile.TemporaryDirectory(prefix="autotune-smoke-") as logs:
        smoke = Smoke(SETTINGS[options.device], logs)
        try:
            smoke.run()
        finally:
            smoke.pool.shutdown()
    report = smoke.report()
    print(f"{sum(check['passed'] for check in smoke.checks)} of {len(smoke.checks)} checks passed")
    if options.json:
        print(json.dumps(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
