"""Measure every candidate of the demo space on this machine, several times, for other benchmarks to replay.

    python benchmarks/record_cpu_grid.py --out FILE.jsonl [--repeats 3]

Each legal candidate of `search_spaces/tiny-cpu.yaml` runs as a study would run it: two ranks of a `NodePool` on gloo,
with the file's own measuring protocol, and with a limit so large that nothing runs out of memory (what would, is known
from its peak). The candidates run in a random order, then again in another, so that a slow hour of the machine does not
fall on one config. FILE gets one line per run as it ends: the config, its step time, tokens/s/GPU and peak; a line
before them names the hardware and versions. A run that was cut off goes on where it stopped.

Three repeats take about an hour. Nothing else should run meanwhile.
"""

import argparse
import datetime
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from autotune.space.space import Space, load_space
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Measurement
from autotune.spec.request import TrialRequest
from autotune.trial.compose import compose
from autotune.trial.environment import environment
from autotune.trial.pool import NodePool
from autotune.units import GIB

SPACE = Path(__file__).parents[1] / "search_spaces" / "tiny-cpu.yaml"
AMPLE_BYTES = 8 * GIB
"""A limit that no candidate reaches."""
LIMIT_SECONDS = 900.0


def identity(config: TrialConfig) -> str:
    """A text that no two configs share."""
    return json.dumps(config.to_dict(), sort_keys=True)


def header(space: Space) -> dict[str, Any]:
    """What was measured on."""
    versions = environment("cpu")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": versions.pop("device"),
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": versions,
        "space": SPACE.name,
        "study_identity": space.identity,
    }


def measure(pool: NodePool, space: Space, config: TrialConfig, trial_id: str) -> Measurement:
    """One run.

    Raises:
        RuntimeError: it failed, which with an ample limit no candidate should.
    """
    request = TrialRequest(
        trial_id=trial_id,
        model=space.model,
        workload=space.workload,
        config=config,
        device="cpu",
        measure=space.measure,
        memory_limit_bytes=AMPLE_BYTES,
        timeout_seconds=LIMIT_SECONDS,
        stall_seconds=LIMIT_SECONDS,
    )
    started = time.monotonic()
    result = pool.run(
        request,
        ranks=range(config.gpus),
        world_size=config.gpus,
        master_address="127.0.0.1",
        master_port=pool.free_port(),
    )
    if result.failure is not None:
        raise RuntimeError(f"{trial_id} failed: {result.failure.message}")
    measured = compose(result.ranks, request, space.cluster.gpu)
    return replace(measured, elapsed_seconds=time.monotonic() - started)


def record(out: Path, repeats: int) -> None:
    """Append what FILE does not have yet."""
    space = load_space(SPACE)
    top = header(space)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    if lines and any(lines[0][key] != top[key] for key in ("hardware", "versions", "study_identity")):
        raise SystemExit(
            f"{out} was recorded on another machine, with other versions or another space; name a new file"
        )
    done = {(identity(TrialConfig.from_dict(line["config"])), line["repeat"]) for line in lines[1:]}
    with out.open("a", encoding="utf-8") as file, tempfile.TemporaryDirectory(prefix="grid-") as logs:
        if not lines:
            print(json.dumps(top), file=file, flush=True)
        pool = NodePool(device="cpu", log_dir=logs)
        try:
            for repeat in range(repeats):
                configs = list(space.candidates)
                random.Random(repeat).shuffle(configs)
                for number, config in enumerate(configs, 1):
                    if (identity(config), repeat) in done:
                        continue
                    measured = measure(pool, space, config, f"{repeat}-{number}")
                    line = {
                        "config": config.to_dict(),
                        "repeat": repeat,
                        "step_time_seconds": measured.step_time_seconds,
                        "tokens_per_second_per_gpu": measured.tokens_per_second_per_gpu,
                        "peak_memory_allocated_bytes": measured.peak_memory_allocated_bytes,
                        "elapsed_seconds": measured.elapsed_seconds,
                        "micro_step_seconds": [rank.micro_step_seconds for rank in measured.ranks],
                        "update_step_seconds": [rank.update_step_seconds for rank in measured.ranks],
                        "phase_seconds": measured.phase_seconds,
                    }
                    print(json.dumps(line), file=file, flush=True)
                    print(
                        f"{repeat + 1}/{repeats} {number}/{len(configs)}: {measured.elapsed_seconds:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
        finally:
            pool.shutdown()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where runs are appended")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each candidate")
    options = parser.parse_args()
    record(options.out, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
