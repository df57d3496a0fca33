"""`Operators`: what a structure's training step executes, operator by operator, as rows of equal ones.

A row is a kind of work, a dtype, a size that is a line in the micro-batch size, and how often it happens in a phase.
Sizes are FLOPs of products and attention, bytes of collectives (the whole tensor), and bytes read and written of all
else that works on data. Every operator that PyTorch dispatches, views included, is a `CALL` besides, of size 0: on a
processor that is what small models spend most of their time on.

Counted once for a structure (`counting.py`) and kept on disk beside the traces of memory.
"""

import contextlib
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import autotune
from autotune.predict.memory import structures
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec

Phase = Literal["micro_step", "last_micro_step", "update"]
"""Forward and backward pass of a micro-step that only accumulates; of the one that ends in an update; the update."""
PHASES: tuple[Phase, ...] = ("micro_step", "last_micro_step", "update")


class Work(StrEnum):
    """Kinds of work."""

    CALL = "call"
    """One dispatched operator, whatever it does."""
    SHARDED_CALL = "sharded_call"
    """One on DTensors."""
    PRODUCT = "product"
    ATTENTION = "attention"
    ATTENTION_BACKWARD = "attention_backward"
    MOVED = "moved"
    """Any other operator on data."""
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    BROADCAST = "broadcast"


COLLECTIVES = (Work.ALL_REDUCE, Work.ALL_GATHER, Work.REDUCE_SCATTER, Work.BROADCAST)


@dataclass(frozen=True, slots=True)
class Row:
    """Equal operators of one phase."""

    phase: Phase
    work: Work
    dtype: str
    """`fp32`, `bf16`, `fp16`, or `other`; of collectives `bytes`, of calls `other`."""
    fixed: float
    """Of the size: what does not depend on the micro-batch."""
    per_sequence: float
    """Of the size, for each sequence of the micro-batch."""
    count: float
    """Of models that are counted at two depths it can be negative: a buffer of the whole model is three rows then."""

    def size(self, micro_batch: NDArray[Any]) -> NDArray[np.float64]:
        """FLOPs or bytes of one of them, at each micro-batch size."""
        return np.asarray(np.maximum(self.fixed + self.per_sequence * micro_batch, 0.0))


@dataclass(frozen=True, slots=True)
class Operators:
    """One optimizer step of a structure, at one sequence length."""

    rows: tuple[Row, ...]


def operators_name(model: ModelSpec, config: TrialConfig) -> str:
    """What `operators` is asked for: all of a config that decides on its operators, as text."""
    structure = structures(model, config, accumulates=True)[0]
    return json.dumps({"structure": structure, "sequence_length": config.sequence_length, "sources": _sources()})


def is_counted(name: str) -> bool:
    """Whether the operators are on disk already."""
    return _file(name).exists()


@functools.lru_cache(maxsize=1024)
def operators(name: str) -> Operators:
    """The operators of an `operators_name`: from memory, from disk, or counted.

    Raises:
        UsageError: the engine refuses the config.
    """
    file = _file(name)
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or cut off by a full disk
        return Operators(tuple(_row(fields) for fields in json.loads(file.read_text(encoding="utf-8"))))
    from autotune.predict.counting import count_operators  # torch, transformers and the engine

    asked: dict[str, Any] = json.loads(name)
    fields: dict[str, Any] = json.loads(asked["structure"])
    config = TrialConfig.from_dict({**fields["config"], "sequence_length": asked["sequence_length"]})
    found = count_operators(ModelSpec(**fields["model"]), config)
    _keep(file, found)
    return found


def _row(fields: list[Any]) -> Row:
    phase, work, dtype, *sizes = fields
    return Row(phase, Work(work), dtype, *sizes)


@functools.cache
def _sources() -> str:
    root = Path(autotune.__file__).parent / "predict"
    return hashlib.sha256((root / "counting.py").read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]


def _file(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "autotune" / "operators" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def _keep(file: Path, found: Operators) -> None:
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    rows = [[row.phase, row.work.value, row.dtype, row.fixed, row.per_sequence, row.count] for row in found.rows]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(rows), encoding="utf-8")
        fresh.replace(file)
    except OSError:  # a home that cannot be written costs time, nothing else
        with contextlib.suppress(OSError):
            fresh.unlink()
