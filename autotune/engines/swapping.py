"""What a machine must grant before DeepSpeed may swap to its disk: DeepSpeed 0.19 checks neither.

It locks its buffers in memory, and takes the null pointer that a refusal gives for a buffer. And it reads gradients
past the page cache into the middle of a buffer, wherever a parameter begins there. A disk that wants memory aligned to
its blocks refuses that, nobody looks (csrc/aio/common/deepspeed_aio_common.cpp), and the update takes what the buffer
had.
"""

import mmap
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

from autotune.errors import UsageError
from autotune.units import format_bytes

_FLOAT_BYTES = 4
_BLOCK_BYTES = 512
"""What memory has to be aligned to at most, for a read past the page cache (man 2 open, O_DIRECT)."""
_CAP_IPC_LOCK = 14
"""Bit of the capability that has no limit (linux/capability.h)."""


def require_locked_memory(needed_bytes: int) -> None:
    """Refuse buffers that the kernel would not let this process lock.

    Raises:
        UsageError: they are larger than the limit (`ulimit -l`), and the process is bound by it.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or needed_bytes <= limit or _may_lock_all():
        return
    raise UsageError(
        f"offload to a disk locks {format_bytes(needed_bytes)} of memory a rank, and the limit is"
        f" {format_bytes(limit)}; raise it (ulimit -l unlimited, --ulimit memlock=-1), or set a smaller"
        " zero_optimization.sub_group_size"
    )


def require_aligned_gradients(optimizer: Any, folder: Path) -> None:
    """Refuse a model whose swapped gradients the disk would not read back to where they belong.

    Args:
        optimizer: DeepSpeed's of ZeRO-3, which swaps.
        folder: on the disk.

    Raises:
        UsageError: see above.
    """
    offsets = [
        _FLOAT_BYTES * offset
        for _, offset, numel in optimizer.grad_position.values()
        if optimizer.optimizer_swapper.is_swappable_tensor(numel=numel)
    ]
    if all(offset % _BLOCK_BYTES == 0 for offset in offsets) or reads_to_any_address(folder):
        return
    raise UsageError(
        f"offload to a disk: the one of nvme.path reads only to memory aligned to {_BLOCK_BYTES} bytes, and on so"
        " many ranks gradients of this model lie between; DeepSpeed would train on wrong ones. Use a disk that is not"
        " virtual under Linux 6.0 or later, or another number of GPUs"
    )


def reads_to_any_address(folder: Path) -> bool:
    """Whether the file system reads past the page cache to addresses that are multiples of 4 bytes alone."""
    block = 4096
    memory = memoryview(mmap.mmap(-1, 2 * block))
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            descriptor = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            try:
                os.pwritev(descriptor, [memory[:block]], 0)
                return os.preadv(descriptor, [memory[_FLOAT_BYTES : _FLOAT_BYTES + block]], 0) == block
            finally:
                os.close(descriptor)
    except OSError:
        return False


def _may_lock_all() -> bool:
    status = Path("/proc/self/status").read_text()
    (effective,) = (line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)
