"""How long does a plan of hundreds of thousands of candidates take, and how much memory?

    python benchmarks/plan_warm.py [--json]

Plans a space of Qwen3-32B with 234,024 legal candidates twice, each time in a new process as `autotune plan --json`
does it, with the cache of traces in a folder of its own: the first time every structure is traced, which takes minutes;
the second time (warm) nothing is. Gate on the warm one: at most 3 seconds and 2 GiB, start of Python included.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from autotune.units import GIB

MOST_SECONDS = 3.0
MOST_BYTES = 2 * GIB
SPACE = """
study: plan-warm
model: Qwen/Qwen3-32B
cluster: {nodes: 1, gpus_per_node: 8, gpu: H100-80GB}
workload: {global_batch_size: 512, sequence_length: 4096}
search:
  engine: [deepspeed, pytorch]
  precision: [bf16, fp16]
  zero_stage: [1, 2, 3]
  offload: [none, optimizer, optimizer+parameters]
  activation_checkpointing: [none, selective, full]
  selective_every: [2]
  micro_batch_size: [1, 2, 4, 8, 16, 32, 64]
  attention: [sdpa, flash_attention_2]
  deepspeed:
    zero_optimization.overlap_comm: [true, false]
    zero_optimization.contiguous_gradients: [true, false]
    zero_optimization.reduce_bucket_size: [5.0e+7, 1.0e+8, 2.0e+8, 5.0e+8]
    zero_optimization.allgather_bucket_size: [5.0e+7, 2.0e+8, 5.0e+8]
    zero_optimization.stage3_prefetch_bucket_size: [1.0e+7, 5.0e+7, 5.0e+8]
    zero_optimization.stage3_max_live_parameters: [5.0e+8, 1.0e+9]
    zero_optimization.stage3_param_persistence_threshold: [1.0e+4, 1.0e+5, 1.0e+6]
budget: {trials: 24, trial_seconds: 900}
"""


def plan(space: Path, cache: Path) -> tuple[float, dict[str, Any]]:
    """(seconds, the document that the command prints)."""
    started = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "autotune", "plan", str(space), "--json"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return time.monotonic() - started, document


def compare(scratch: Path) -> dict[str, Any]:
    """Both runs."""
    space = scratch / "space.yaml"
    space.write_text(SPACE, encoding="utf-8")
    cold_seconds, document = plan(space, scratch)
    structures = len(list((scratch / "autotune" / "traces").glob("*.npz")))
    warm_seconds, again = plan(space, scratch)
    # The largest child by now is a tracing process of the cold run; so that of the warm one is asked alone.
    peak = warm_peak_bytes(space, scratch)
    return {
        "benchmark": "plan_warm",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"cores": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total},
        "candidates": document["candidates"],
        "structures": structures,
        "cold_seconds": cold_seconds,
        "warm_seconds": warm_seconds,
        "warm_peak_bytes": peak,
        "equal": document == again,
        "passed": document == again
        and document["candidates"] >= 200_000
        and structures >= 24
        and warm_seconds <= MOST_SECONDS
        and peak <= MOST_BYTES,
    }


def warm_peak_bytes(space: Path, cache: Path) -> int:
    """Highest resident memory of a warm plan, from a process that has no other child."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import plan_warm; plan_warm.print_peak()"
    run = subprocess.run(
        [sys.executable, "-c", code, str(space), str(cache)], capture_output=True, check=True, text=True
    )
    return int(run.stdout.splitlines()[-1])


def print_peak() -> None:
    """Plan, then print the highest resident memory among this process' children, in bytes."""
    plan(Path(sys.argv[1]), Path(sys.argv[2]))
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        report = compare(Path(scratch))
    print(f"{report['candidates']} candidates, {report['structures']} structures")
    print(f"cold {report['cold_seconds']:.1f} s, warm {report['warm_seconds']:.2f} s (at most {MOST_SECONDS:g})")
    print(f"warm, at most {report['warm_peak_bytes'] / GIB:.2f} GiB resident (at most {MOST_BYTES / GIB:g})")
    print("passed" if report["passed"] else "FAILED")
    if options.json:
        print(json.dumps(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
