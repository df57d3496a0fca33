"""What an exception in a rank means.

By type where a type exists. Libraries raise many refused allocations as a plain RuntimeError, so their texts are known
here too; each is quoted from a message that was seen or from the source that makes it.
"""

import re
import sys
from collections.abc import Iterator, Sequence

from autotune.spec.outcome import FailureKind, Phase, RankFailure
from autotune.spec.request import DeviceType

MAX_MESSAGE_CHARACTERS = 2000
"""CUDA's out-of-memory message has about 600; a validation error can have thousands."""

_DEVICE_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|HIP error: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|(?:Cuda|HIP) failure(?: \d+)? '?out of memory",  # NCCL and RCCL
    re.IGNORECASE,
)
_HOST_OUT_OF_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|\bENOMEM\b", re.IGNORECASE)
_REQUESTED = re.compile(r"tried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_UNIT_BYTES = {"bytes": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4}

# What survivors say when a peer is gone or late: gloo, TCPStore, NCCL and its watchdog.
_PEER_GONE = re.compile(
    r"Connection closed by peer|Connection reset|Broken pipe|Socket closed|Connection refused"
    r"|remote process exited or there was a network error|NCCL communicator was aborted|ncclRemoteError",
    re.IGNORECASE,
)
_PEER_LATE = re.compile(
    r"Timed out waiting|collective operation timeout|[Ss]ocket [Tt]imeout|wait timeout|has timed out after"
    r"|Timed out after \d+ seconds waiting for clients",
    re.IGNORECASE,
)

# What libraries raise when they refuse a config while the model is built. pydantic's ValidationError is a ValueError.
_REFUSALS = (ValueError, AssertionError, ImportError, NotImplementedError, KeyError)


class NonFiniteLossError(ArithmeticError):
    """A loss is NaN or infinite."""


class ReportedFailureError(Exception):
    """Another process, which ran the rank's work, has failed; it or its end has said why."""

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def is_collateral(text: str) -> bool:
    """Whether a rank's message only says that another rank is gone or late: then the other rank's verdict counts."""
    return bool(_PEER_GONE.search(text)) or is_collective_timeout(text)


def is_collective_timeout(text: str) -> bool:
    """Whether a rank waited for others until its process group gave up, which is how a hang looks from inside."""
    return bool(_PEER_LATE.search(text))


def classify(error: BaseException, *, rank: int, phase: Phase, device: DeviceType) -> RankFailure:
    """The verdict on an exception that ended a rank.

    A refused allocation anywhere in the chain of causes is the verdict: libraries wrap it, and clean-up code that runs
    while memory is short fails in other ways. In phase `start` the config has not been looked at yet, so what fails
    there through no fault of our code is `worker_lost`.
    """
    if isinstance(error, ReportedFailureError):
        return error.failure
    for cause in _chain(error):
        kind = _memory_kind(cause, device)
        if kind is not None:
            return RankFailure(
                rank=rank,
                # Full before the model is built: somebody else has the memory.
                kind=FailureKind.WORKER_LOST if phase is Phase.START else kind,
                phase=phase,
                message=describe(cause),
                requested_bytes=requested_bytes(str(cause)),
            )
    return RankFailure(rank=rank, kind=_other_kind(error, phase), phase=phase, message=describe(error))


def describe(error: BaseException) -> str:
    """`ValueError: what it says`, cut to a length that a table and a database bear."""
    return f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARACTERS]


def requested_bytes(text: str) -> int | None:
    """The size in `Tried to allocate 2.00 GiB` (CUDA, rounded by PyTorch) or `tried to allocate 4096 bytes` (CPU)."""
    match = _REQUESTED.search(text)
    return int(float(match[1]) * _UNIT_BYTES[match[2].lower()]) if match else None


def memory_kind_of_log(lines: Sequence[str]) -> FailureKind | None:
    """Which memory the last lines of a log say has run out, if any: for a process that says it nowhere else."""
    text = "\n".join(lines)
    # PyTorch's allocator of host memory is that of tensors, which on CPU are the device's.
    if _DEVICE_OUT_OF_MEMORY.search(text) or "torch.OutOfMemoryError" in text or "DefaultCPUAllocator" in text:
        return FailureKind.OUT_OF_MEMORY
    return FailureKind.HOST_OUT_OF_MEMORY if _HOST_OUT_OF_MEMORY.search(text) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _memory_kind(error: BaseException, device: DeviceType) -> FailureKind | None:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return FailureKind.OUT_OF_MEMORY
    if isinstance(error, MemoryError):
        return FailureKind.HOST_OUT_OF_MEMORY
    if not isinstance(error, (RuntimeError, OSError)):
        return None
    text = str(error)
    if isinstance(error, torch.AcceleratorError) and "out of memory" in text:
        return FailureKind.OUT_OF_MEMORY
    if _DEVICE_OUT_OF_MEMORY.search(text):
        return FailureKind.OUT_OF_MEMORY
    if _HOST_OUT_OF_MEMORY.search(text):
        # On CPU host memory is the device's; a failed allocation of a tensor there is RLIMIT_DATA behind the tracker.
        tensor = device == "cpu" and isinstance(error, RuntimeError)
        return FailureKind.OUT_OF_MEMORY if tensor else FailureKind.HOST_OUT_OF_MEMORY
    return None


def _other_kind(error: BaseException, phase: Phase) -> FailureKind:
    import torch
    import torch.distributed as dist

    if isinstance(error, NonFiniteLossError):
        return FailureKind.NON_FINITE_LOSS
    text = str(error)
    if phase is Phase.START and isinstance(error, (dist.DistError, torch.AcceleratorError, OSError)):
        return FailureKind.WORKER_LOST  # the machine or the network: no config has been tried yet
    if is_collective_timeout(text):
        return FailureKind.HANG
    if phase is Phase.BUILD and (isinstance(error, _REFUSALS) or _is_deepspeed_config_error(error)):
        return FailureKind.INVALID_CONFIG
    return FailureKind.CRASH


def _is_deepspeed_config_error(error: BaseException) -> bool:
    # Imported by the engine if it can have been raised at all; PyTorch trials need not pay for the import.
    module = sys.modules.get("deepspeed.runtime.config")
    return module is not None and isinstance(error, module.DeepSpeedConfigError)
