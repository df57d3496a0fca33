"""Traces many structures at once, each in a process that takes no part in anything else."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed

from autotune.predict.memory import is_traced, stream, structures
from autotune.predict.operators import is_counted, operators
from autotune.space.space import Space
from autotune.spec.config import TrialConfig

_PR_SET_PDEATHSIG = 1

MAX_WORKERS = 16
"""Processes that trace at the same time; each has the libraries in memory, about half a GiB."""

OnTraced = Callable[[int, int], None]
"""Told how many structures of how many are traced."""


def micro_steps(space: Space, config: TrialConfig) -> int:
    """Micro-batches of an optimizer step; 0 where the batch does not divide."""
    try:
        return space.workload.gradient_accumulation_steps(config)
    except ValueError:  # no candidate
        return 0


def structures_of(space: Space, config: TrialConfig) -> tuple[str, ...]:
    """What has to be traced for a config of a space."""
    steps = micro_steps(space, config)
    return structures(space.model, config, accumulates=steps > 1, batches=steps)


def trace_structures(
    names: Iterable[str], on_traced: OnTraced = lambda done, total: None, *, counted: Iterable[str] = ()
) -> dict[str, str]:
    """Trace what is not on disk yet; returns why some structures could not be.

    Args:
        names: of `memory.structures`.
        on_traced: told after each.
        counted: names of `operators.operators_name`, whose operators are counted besides.
    """
    missing = sorted(name for name in names if not is_traced(name))
    uncounted = {name for name in counted if not is_counted(name)}
    missing += sorted(uncounted)
    if not missing:
        return {}
    reasons: dict[str, str] = {}
    on_traced(0, len(missing))
    # In processes of their own: a trace takes the process group and changes libraries meanwhile. Not forked, because
    # this process may have threads.
    workers = min(len(missing), len(os.sched_getaffinity(0)), MAX_WORKERS)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=prepare) as pool:
        running = {pool.submit(_count if name in uncounted else _trace, name): name for name in missing}
        try:
            for done, future in enumerate(as_completed(running), 1):
                reason = future.result()
                if reason is not None:
                    reasons[running[future]] = reason
                on_traced(done, len(missing))
        except BaseException:  # Ctrl-C: what is traced stays on disk, and nothing more is begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return reasons


def _trace(name: str) -> str | None:
    return _reason(stream, name)


def _count(name: str) -> str | None:
    return _reason(operators, name)


def _reason(run: Callable[[str], object], name: str) -> str | None:
    try:
        run(name)
    except Exception as error:  # whatever a library says of a config: it is that config's problem, not the plan's
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def prepare() -> None:
    """Keep a tracing process to one core and away from the terminal, and let it end with its parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
