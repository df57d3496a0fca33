"""`MachineRates`: how fast this machine's processors are, measured by a short self-benchmark where no table says it.

The ranks of a trial share cores, caches and memory, so the benchmark runs in as many processes as the trial has ranks,
all at once (`self_benchmark.py`). Figures are kept on disk for the machine, the versions and the number of ranks; to
delete `~/.cache/autotune/machine` has them measured anew.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import autotune
from autotune.errors import UnknownHardwareError
from autotune.predict.tracing import prepare

_PACKAGES = ("torch", "transformers")
RANKS_PER_CORE = 4

Curve = tuple[tuple[float, float], ...]
"""(size, seconds) of ascending sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """What ranks that all work at once need, in seconds."""

    call_seconds: float
    """To dispatch one operator of a decoder layer, forward or backward, as trials do it: their memory is counted."""
    sharded_call_seconds: float
    """The same of an operator on a DTensor."""
    work: dict[str, dict[str, Curve]]
    """Kind of work (`operators.Work`) and dtype to seconds by FLOPs or bytes. Collectives: dtype `bytes`."""

    def seconds(self, work: str, dtype: str, size: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of operators of these sizes.

        Between measured sizes a power law, beyond the largest in proportion to it, below the smallest as long as it.

        Raises:
            UnknownHardwareError: this dtype was not measured.
        """
        curves = self.work[work]
        curve = curves.get(dtype) or curves.get("fp32") or curves.get("bytes")
        if curve is None:
            raise UnknownHardwareError(f"the self-benchmark has not measured {work} of {dtype}")
        sizes, seconds = np.array(curve).T
        within = np.exp(np.interp(np.log(np.maximum(size, 1.0)), np.log(sizes), np.log(seconds)))
        return np.asarray(np.where(size > sizes[-1], size * seconds[-1] / sizes[-1], within))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        work = {
            kind: {
                dtype: tuple((float(size), float(seconds)) for size, seconds in curve) for dtype, curve in of.items()
            }
            for kind, of in fields["work"].items()
        }
        return cls(**{**fields, "work": work})


def machine_rates(ranks: int, precisions: Iterable[str], on_measure: Callable[[], None] = lambda: None) -> MachineRates:
    """The rates of this machine, from disk or measured now, which takes some seconds.

    Args:
        ranks: of a trial, all on this machine.
        precisions: that trials compute in; fp32 is measured in any case.
        on_measure: called before anything is measured.

    Raises:
        UnknownHardwareError: the benchmark failed.
    """
    dtypes = tuple(sorted({"fp32", *precisions}))
    file = _file(ranks, dtypes)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return MachineRates.from_dict(json.loads(file.read_text(encoding="utf-8")))
    on_measure()
    rates = measure(ranks, dtypes)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a home that cannot be written costs time, nothing else
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(rates.to_dict()), encoding="utf-8")
        fresh.replace(file)
    return rates


def measure(ranks: int, dtypes: tuple[str, ...]) -> MachineRates:
    """Run the benchmark, whatever is on disk.

    Raises:
        UnknownHardwareError: it failed, or so many ranks say nothing about a machine of so few cores.
    """
    cores = len(os.sched_getaffinity(0))
    if ranks > RANKS_PER_CORE * cores:
        raise UnknownHardwareError(
            f"{ranks} ranks cannot be timed on the {cores} cores of this machine; plan on a node of the cluster"
        )
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as folder:
        meeting = str(Path(folder) / "meeting")
        # Not forked, because this process may have threads.
        with ProcessPoolExecutor(ranks, multiprocessing.get_context("spawn"), initializer=prepare) as pool:
            futures = [pool.submit(_run, rank, ranks, dtypes, meeting) for rank in range(ranks)]
            try:
                found = [future.result() for future in futures]
            except Exception as error:  # whatever it is, a study can do without
                message = " ".join(str(error).split())[:200]
                raise UnknownHardwareError(
                    f"the self-benchmark of this machine failed: {type(error).__name__}: {message}"
                ) from error
    return _together([MachineRates.from_dict(one) for one in found])


def _run(rank: int, ranks: int, dtypes: tuple[str, ...], meeting: str) -> dict[str, Any]:
    from autotune.predict.self_benchmark import run_rank  # torch and transformers

    return run_rank(rank, ranks, dtypes, meeting).to_dict()


def _together(ranks: list[MachineRates]) -> MachineRates:
    """Means over the ranks, whose differences are chance."""
    work = {
        kind: {
            dtype: tuple(
                (size, float(np.mean([one.work[kind][dtype][at][1] for one in ranks])))
                for at, (size, _) in enumerate(curve)
            )
            for dtype, curve in of.items()
        }
        for kind, of in ranks[0].work.items()
    }
    return MachineRates(
        call_seconds=float(np.mean([one.call_seconds for one in ranks])),
        sharded_call_seconds=float(np.mean([one.sharded_call_seconds for one in ranks])),
        work=work,
    )


def _file(ranks: int, dtypes: tuple[str, ...]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parts = {"processor": processor(), "cores": sorted(os.sched_getaffinity(0)), "ranks": ranks, "dtypes": dtypes}
    text = json.dumps(parts | {"versions": _versions()}, sort_keys=True)
    return cache / "autotune" / "machine" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def processor() -> str:
    """Name of this machine's processor."""
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.machine()


@functools.cache
def _versions() -> dict[str, str]:
    root = Path(autotune.__file__).parent
    sources = [root / "predict" / "self_benchmark.py", root / "modeling" / "memory_tracker.py"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    return {"autotune": digest, **{package: importlib.metadata.version(package) for package in _PACKAGES}}
