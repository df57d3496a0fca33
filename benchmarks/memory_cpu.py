"""Is the predicted peak memory of a trial the measured one? Every config of the demo space, on CPU.

    python benchmarks/memory_cpu.py [--sample N] [--keep DIR] [--json]

Each legal candidate of `search_spaces/tiny-cpu.yaml`, both engines, runs as a study would run it: two ranks of a
`NodePool` on gloo, with the file's own measuring protocol, and with a limit so large that nothing runs out of memory.
Its measured peak is that of the fullest rank: bytes of live tensors, which on a CPU are the device's memory. Its
prediction is `predict_memory`, which sees nothing of the run. By engine:

- error: |predicted / measured - 1|. Gates on the largest: 1 % on `pytorch`, 3 % on `deepspeed`.
- verdict: at ten limits, spread evenly between the smallest and the largest measured peak, does "predicted peak within
  the limit" say what "measured peak within the limit" says? Gate: always.
- approximate: configs whose structure failed the check that layers repeat, so that the prediction is a `SitedStream`.
- unpredicted: configs that could not be traced, with the reason.

All candidates take some minutes. --sample N draws N of them with a fixed seed. With --keep, peaks are written to
DIR/measured.json as they come, and a later run measures only what is missing; those of other library versions or
another protocol are not taken. With --json the last line is one object.
"""

import argparse
import datetime
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from record_cpu_grid import SPACE, measure

from autotune.predict.memory import predict_memory, rank_streams
from autotune.predict.stream import SitedStream
from autotune.space.space import Space, load_space
from autotune.spec.config import TrialConfig
from autotune.trial.environment import environment
from autotune.trial.pool import NodePool
from autotune.units import MIB

SEED = 0
LIMITS = 10
LARGEST_ERROR = {"pytorch": 0.01, "deepspeed": 0.03}
"""Gates, by engine."""


@dataclass(frozen=True, slots=True)
class Row:
    """One config."""

    config: TrialConfig
    measured_bytes: int
    predicted_bytes: int | None
    """None where the structure could not be traced."""
    remark: str
    """`approximate`, or why there is no prediction; mostly empty."""

    @property
    def error(self) -> float:
        """A ratio, without sign."""
        return abs((self.predicted_bytes or 0) / self.measured_bytes - 1)


class Peaks:
    """Measured peaks, on disk as they come."""

    def __init__(self, folder: Path, space: Space, versions: dict[str, str]) -> None:
        self._file = folder / "measured.json"
        self._protocol = json.dumps({"space": space.identity, "versions": versions}, sort_keys=True)
        self._bytes: dict[str, int] = {}
        if self._file.exists():
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            if stored["protocol"] == self._protocol:
                self._bytes = stored["peak_bytes"]

    def measure(self, configs: Iterable[TrialConfig], space: Space, logs: Path) -> dict[TrialConfig, int]:
        """Peak bytes of the fullest rank; a trial that fails is an error."""
        configs = list(configs)
        missing = [config for config in configs if _key(config) not in self._bytes]
        if missing:
            pool = NodePool(device="cpu", log_dir=str(logs))
            try:
                for number, config in enumerate(missing, 1):
                    started = time.monotonic()
                    self._bytes[_key(config)] = measure(pool, space, config, _key(config)).peak_memory_allocated_bytes
                    self._write()
                    seconds = time.monotonic() - started
                    print(f"{number}/{len(missing)} {_key(config)}: {seconds:.1f} s", file=sys.stderr, flush=True)
            finally:
                pool.shutdown()
        return {config: self._bytes[_key(config)] for config in configs}

    def _write(self) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps({"protocol": self._protocol, "peak_bytes": self._bytes}, indent=1))
        fresh.replace(self._file)


def _key(config: TrialConfig) -> str:
    """Readable, and no two configs have the same."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    return (
        f"{config.engine}-{config.zero_stage}-{config.precision}-{config.activation_checkpointing}"
        f"-mb{config.micro_batch_size}-{digest}"
    )


def predicted(config: TrialConfig, measured: int, space: Space) -> Row:
    """A row; a structure that cannot be traced is one, too."""
    accumulates = space.workload.gradient_accumulation_steps(config) > 1
    try:
        memory = predict_memory(config, space.model, space.workload, space.cluster)
        streams = rank_streams(space.model, config, accumulates=accumulates)
    except Exception as error:  # whatever a library says of a config: its row is listed, and the gate fails
        return Row(config, measured, None, f"{type(error).__name__}: {error}")
    approximate = any(isinstance(stream, SitedStream) for stream in streams)
    return Row(config, measured, memory.device_used_bytes, "approximate" if approximate else "")


def judge(rows: list[Row], largest_error: float) -> dict[str, Any]:
    """The figures of one engine."""
    known = [row for row in rows if row.predicted_bytes is not None]
    unpredicted = {_key(row.config): row.remark for row in rows if row.predicted_bytes is None}
    if not known:
        return {"configs": len(rows), "unpredicted": unpredicted, "passed": False}
    errors = [row.error for row in known]
    peaks = [row.measured_bytes for row in known]
    low, high = min(peaks), max(peaks)
    # Within the range, since at its ends every verdict is the same.
    limits = [low + (high - low) * (i + 0.5) / LIMITS for i in range(LIMITS)]
    verdicts = [
        ((row.predicted_bytes or 0) <= limit) == (row.measured_bytes <= limit) for row in known for limit in limits
    ]
    return {
        "configs": len(rows),
        "predicted_to_the_byte": sum(row.predicted_bytes == row.measured_bytes for row in known),
        "error_max": max(errors),
        "error_median": statistics.median(errors),
        "within_1_percent": sum(error <= 0.01 for error in errors),
        "within_3_percent": sum(error <= 0.03 for error in errors),
        "smallest_peak_bytes": low,
        "largest_peak_bytes": high,
        "verdicts": len(verdicts),
        "verdicts_right": sum(verdicts),
        "approximate": [_key(row.config) for row in known if row.remark == "approximate"],
        "unpredicted": unpredicted,
        "worst": {_key(row.config): row.error for row in sorted(known, key=lambda row: -row.error)[:5] if row.error},
        "passed": not unpredicted and max(errors) <= largest_error and all(verdicts),
    }


def compare(sample: int | None, folder: Path) -> dict[str, Any]:
    """Measure, predict, judge."""
    space = load_space(SPACE)
    configs = list(space.candidates)
    random.Random(SEED).shuffle(configs)
    versions = environment("cpu")
    measured = Peaks(folder, space, versions).measure(configs[:sample], space, folder / "logs")
    rows = [predicted(config, peaks, space) for config, peaks in measured.items()]
    engines = {
        engine: judge(found, largest_error)
        for engine, largest_error in LARGEST_ERROR.items()
        if (found := [row for row in rows if row.config.engine == engine])
    }
    return {
        "benchmark": "memory_cpu",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": versions.pop("device"),
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": versions,
        "space": SPACE.name,
        "candidates": len(configs),
        "engines": engines,
        "passed": all(engine["passed"] for engine in engines.values()),
    }


def show(report: dict[str, Any]) -> None:
    """Plain lines."""
    for name, found in report["engines"].items():
        print(f"{name}: {found['configs']} configs, gate {'passed' if found['passed'] else 'FAILED'}")
        for key, reason in found["unpredicted"].items():
            print(f"  not predicted: {key}: {reason}")
        if "error_max" not in found:
            continue
        print(
            f"  measured peaks of {found['smallest_peak_bytes'] / MIB:.1f} to {found['largest_peak_bytes'] / MIB:.1f}"
            f" MiB\n  error: at most {found['error_max']:.4%}, median {found['error_median']:.4%};"
            f" {found['predicted_to_the_byte']} to the byte, {found['within_1_percent']} within 1 %,"
            f" {found['within_3_percent']} within 3 %"
        )
        print(f"  verdict right: {found['verdicts_right']} of {found['verdicts']} (each config at {LIMITS} limits)")
        for key, error in found["worst"].items():
            print(f"  off by {error:.4%}: {key}")
        for key in found["approximate"]:
            print(f"  approximate: {key}")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="only so many candidates")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where measured peaks are kept for a later run")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if options.sample is not None and options.sample < 1:
        parser.error(f"found --sample {options.sample}, but it must be at least 1")
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        report = compare(options.sample, options.keep)
    else:
        with tempfile.TemporaryDirectory(prefix="memory-", ignore_cleanup_errors=True) as scratch:
            report = compare(options.sample, Path(scratch))
    show(report)
    if options.json:
        print(json.dumps(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
