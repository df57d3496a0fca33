"""How long does it take to trace one structure of a 32B model?

    python benchmarks/trace_time.py [--repeats 3] [--json]

Traces the training step of Qwen3-32B on 8 GPUs for each engine, stage and offload, with every layer checkpointed and
gradients accumulated, which is the longest step, and without either. Each structure is traced in a process of its own
that has its libraries imported and has traced nothing before but one small layer; the time is that process' CPU time on
one core, the replay of the allocator included. Gate: the median of each structure is at most 1.5 seconds.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from autotune.space.space import load_space
from autotune.spec.config import TrialConfig

SPACE = Path(__file__).parents[1] / "search_spaces" / "qwen3-32b-sft-8xh100.yaml"
MOST_SECONDS = 1.5
STRUCTURES = (
    ("pytorch", 0, "none"),
    ("pytorch", 2, "none"),
    ("pytorch", 3, "none"),
    ("deepspeed", 0, "none"),
    ("deepspeed", 1, "none"),
    ("deepspeed", 2, "none"),
    ("deepspeed", 2, "optimizer"),
    ("deepspeed", 3, "none"),
    ("deepspeed", 3, "optimizer"),
    ("deepspeed", 3, "optimizer+parameters"),
)
LONGEST, SHORTEST = ("full", True), ("none", False)


def trace(engine: str, zero_stage: int, offload: str, checkpointing: str, accumulates: bool) -> float:
    """CPU seconds of one trace in this process."""
    from autotune.predict.trace import record_trace, trace_stream

    space = load_space(SPACE)
    config = TrialConfig.from_dict(
        space.candidates[0].to_dict()
        | {"engine": engine, "zero_stage": zero_stage, "offload": offload, "precision": "bf16", "deepspeed": {}}
        | {"activation_checkpointing": checkpointing, "selective_every": None, "attention": "sdpa"}
    )
    record_trace(space.model, config, 1, 1, 64, accumulates=accumulates)
    started = time.process_time()
    trace_stream(space.model, config, accumulates=accumulates)
    return time.process_time() - started


def measure(repeats: int) -> dict[str, Any]:
    """Every structure, each time in a new process."""
    seconds: dict[str, list[float]] = {}
    for structure in STRUCTURES:
        for checkpointing, accumulates in (LONGEST, SHORTEST):
            arguments = (*structure, checkpointing, accumulates)
            name = f"{structure[0]} zero-{structure[1]} offload {structure[2]}, checkpointing {checkpointing}" + (
                ", accumulating" if accumulates else ""
            )
            code = (
                "import os, sys; os.environ.update(DS_ACCELERATOR='cpu', OMP_NUM_THREADS='1');"
                f" sys.path.insert(0, {str(Path(__file__).parent)!r});"
                f" import trace_time; print(trace_time.trace(*{arguments!r}))"
            )
            for _ in range(repeats):
                run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
                seconds.setdefault(name, []).append(float(run.stdout.splitlines()[-1]))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "benchmark": "trace_time",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"cores": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total},
        "cpu_seconds": seconds,
        "median_seconds": medians,
        "passed": max(medians.values()) <= MOST_SECONDS,
    }


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="traces of each structure")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"found --repeats {options.repeats}, but it must be at least 1")
    report = measure(options.repeats)
    for name, median in report["median_seconds"].items():
        print(f"{median:5.2f} s  {name}")
    print(f"at most {MOST_SECONDS:g} s each: {'passed' if report['passed'] else 'FAILED'}")
    if options.json:
        print(json.dumps(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
