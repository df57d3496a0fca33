"""What CUDA, cuBLAS, NCCL and PyTorch's caching allocator take of a device, beside what tensors ask for."""

from autotune.units import GIB, MIB

CUDA_CONTEXT_BYTES = GIB // 2
"""Context and loaded kernels of one process. CUDA 12 loads modules lazily (CUDA C++ Programming Guide, "Lazy Loading"),
so this is the lower end of the 0.5 to 1.5 GiB by which nvidia-smi exceeds what PyTorch reserves."""

_HOPPER_AND_LATER = ("H100-80GB", "H200-141GB", "H20-96GB", "B200-180GB")
_HOPPER_WORKSPACE_BYTES = 32 * MIB
_WORKSPACE_BYTES = 8_519_680
"""PyTorch's default cuBLAS workspace, one a handle and stream: `:4096:2:16:8`, two of 4096 KiB and eight of 16 KiB; 32
MiB on Hopper. Source: aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`."""

_NCCL_CONNECTION_BYTES = 4 * MIB + 4_915_200 + 512 * 1024
"""Receive buffers of one connection, one for each protocol: Simple 4 MiB, LL128 120 x 640 x 8 x 8 bytes, LL 8 x 512 x 8
x 16 bytes. Source: NCCL src/init.cc, DEFAULT_BUFFSIZE, DEFAULT_LL128_BUFFSIZE, DEFAULT_LL_BUFFSIZE."""
_NCCL_CHANNELS = 24
"""Collective channels between GPUs that NVLink joins, as NCCL prints them ("24 coll channels")."""
_NCCL_CONNECTIONS = 4
"""A channel receives from one rank in its ring and from up to three in its tree (a parent and two children), and NCCL
before 2.22 connects both when the communicator is made. Point-to-point connections are left out."""
_NVLS_BYTES_PER_RANK = 16 * 2 * (4 * MIB + 2 * MIB)
"""NVLink SHARP: 16 channels, to and fro, a Simple buffer and its 2 MiB alignment, for each rank of the node; NCCL
prints "nvlsPerRankSize 201326592" on an H100. Since NCCL 2.22 a sixth of it. Source: src/transport/nvls.cc."""
_NVLS_MIN_RANKS = 3

_SMALL_BYTES = MIB
_LARGE_SEGMENT_BYTES = 10 * MIB
_SEGMENT_ROUNDING_BYTES = 2 * MIB
_ROUNDING_BYTES = 512


def workspace_bytes(gpu: str) -> int:
    """PyTorch's cuBLAS workspace on a GPU of the table."""
    return _HOPPER_WORKSPACE_BYTES if gpu in _HOPPER_AND_LATER else _WORKSPACE_BYTES


def communicator_bytes(gpu: str, ranks_on_node: int) -> int:
    """What one NCCL communicator takes on each GPU; nothing of it shows in PyTorch's counters.

    Args:
        gpu: its name in the table.
        ranks_on_node: how many of the communicator's ranks share a node.
    """
    size = _NCCL_CHANNELS * _NCCL_CONNECTIONS * _NCCL_CONNECTION_BYTES
    if gpu in _HOPPER_AND_LATER and ranks_on_node >= _NVLS_MIN_RANKS:
        size += ranks_on_node * _NVLS_BYTES_PER_RANK
    return size


def block_bytes(size: int) -> int:
    """What one long-lived tensor takes when the allocator gives it a segment of its own.

    Sizes are rounded to 512 bytes. From 10 MiB on, a segment is a multiple of 2 MiB, and what is left over is split off
    only if it is more than 1 MiB; so a tensor keeps up to 1 MiB too much, and PyTorch counts it as allocated.
    Source: c10/cuda/CUDACachingAllocator.cpp, `round_size`, `get_allocation_size`, `should_split`.
    """
    size = -(-size // _ROUNDING_BYTES) * _ROUNDING_BYTES
    if size < _LARGE_SEGMENT_BYTES:
        return size
    left = -size % _SEGMENT_ROUNDING_BYTES
    return size + left if left <= _SMALL_BYTES else size


def reused_block_bytes(size: int) -> int:
    """What a tensor takes on average when it is put into a block that another one left.

    The block may be up to 1 MiB larger before it is split; half of that is expected. Blocks of up to 1 MiB are split to
    the byte.
    """
    return size + _SMALL_BYTES // 2 if size > _SMALL_BYTES else size
