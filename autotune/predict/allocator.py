"""What PyTorch's CUDA caching allocator reserves for a stream of allocations: a model of it, without a device.

Tensors of a step are allocated and freed one by one, but memory is asked of CUDA in segments that are kept. What was
reserved and is in no tensor (rounding, remainders of split segments, free blocks that are too small for what comes) is
fragmentation: it counts against the device and no sum over tensors shows it.

The model does what `c10/cuda/CUDACachingAllocator.cpp` does: rounding (`round_size`), two pools (`get_pool`), best fit
(`get_free_block`), segments (`get_allocation_size`), splitting (`should_split`), merging of free neighbours
(`try_merge_blocks`), what is given back when CUDA has no more (`release_available_cached_blocks`,
`release_cached_blocks`), and `expandable_segments` (`try_allocate_expandable_block`, `map_block`, `unmap_block`). The
rules were read at PyTorch commits eb42ad6e and 001074d2 (2023 and 2024, they agree) with pull request 134338; the
constants are lines 17-25 and 340 of `c10/core/AllocatorConfig.h` in torch 2.13; what torch 2.12 reserved on a device is
a test.

Not modelled: more than one stream, CUDA graphs' private pools, `roundup_power2_divisions` and
`garbage_collection_threshold` (both off by default), memory that others take from the device meanwhile. CUDA chooses
the addresses of segments; here they ascend, which decides only between free blocks of equal size. An expandable
segment has no end here; in PyTorch it has 9/8 of the device's memory and a further one follows.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.units import MIB

BLOCK_BYTES = 512
"""Sizes are rounded up to a multiple of this (`kMinBlockSize`)."""
SMALL_BYTES = MIB
"""Largest request of the small pool (`kSmallSize`)."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""A segment, or page, of the small pool (`kSmallBuffer`)."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""A segment that several large requests share, or a page (`kLargeBuffer`, in torch 2.13 `large_segment_size_mb`)."""
SHARED_BELOW_BYTES = 10 * MIB
"""Requests from here on have a segment of their own (`kMinLargeAlloc`)."""
SEGMENT_ROUNDING_BYTES = 2 * MIB
"""To a multiple of this such segments are rounded up (`kRoundLarge`)."""
OVERSIZE_ROUNDING_BYTES = 20 * MIB
"""A block that is not split may be larger than its request by less than this (`max_non_split_rounding_mb`)."""

_NO_LIMIT = 2**62

Block = tuple[int, int]
"""(bytes, address): the order in which the best fit is sought."""


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """What `PYTORCH_CUDA_ALLOC_CONF` says.

    Raises:
        ValueError: `max_split_size_bytes` is what PyTorch does not accept.
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    """Blocks of this size and more are not split; None: all are (`max_split_size_mb`, in MiB there)."""

    def __post_init__(self) -> None:
        size = self.max_split_size_bytes
        if size is not None and (size < LARGE_SEGMENT_BYTES or size % MIB):
            raise ValueError(f"max_split_size_bytes is {size}, but whole MiB and at least 20 of them are allowed")


@dataclass(frozen=True, slots=True)
class Replay:
    """What a stream of allocations came to. Bytes, as `torch.cuda.memory_stats` counts them."""

    reserved_peak_bytes: int
    """`max_memory_reserved`: highest bytes asked of CUDA."""
    allocated_peak_bytes: int
    """`max_memory_allocated`: highest bytes in blocks, with rounding and with what was too little to split off."""
    reserved_at_allocated_peak_bytes: int
    """Reserved when the allocated peak was reached first; what it has more than that peak is fragmentation."""
    reserved_bytes: int
    """`memory_reserved` at the end."""
    allocated_bytes: int
    """`memory_allocated` at the end."""
    segments: int
    """Segments at the end, as `memory_snapshot` lists them: of expandable ones, each mapped range."""
    retries: int
    """`num_alloc_retries`: times that everything cached was given back for want of memory. Slow."""
    out_of_memory_at: int | None
    """Index of the event that failed; the replay ended there. None: all were served."""


def replay(
    blocks: NDArray[np.int64],
    sizes: NDArray[np.int64],
    *,
    capacity_bytes: int | None = None,
    settings: AllocatorSettings | None = None,
) -> Replay:
    """Run allocations and frees through an allocator that is empty at first.

    What is held from before, such as parameters, is allocated by the first events.

    Args:
        blocks: (events,): a number for the block that the event is about. It may be used again once it is free.
        sizes: (events,): positive: so many bytes are allocated. Negative: the block is freed, whatever its size. Zero:
            nothing, because an empty tensor has no block.
        capacity_bytes: what CUDA has to give; None: whatever is asked for.
        settings: of the allocator; None: PyTorch's defaults.

    Raises:
        ValueError: an event allocates a block that is not free, or frees one that is.
    """
    allocator = CachingAllocator(settings or AllocatorSettings(), capacity_bytes)
    failed: int | None = None
    for index, (block, size) in enumerate(zip(blocks.tolist(), sizes.tolist(), strict=True)):
        if size < 0:
            allocator.free(block)
        elif size and not allocator.allocate(block, size):
            failed = index
            break
    return Replay(
        reserved_peak_bytes=allocator.reserved_peak_bytes,
        allocated_peak_bytes=allocator.allocated_peak_bytes,
        reserved_at_allocated_peak_bytes=allocator.reserved_at_allocated_peak_bytes,
        reserved_bytes=allocator.reserved_bytes,
        allocated_bytes=allocator.allocated_bytes,
        segments=allocator.segments,
        retries=allocator.retries,
        out_of_memory_at=failed,
    )


class CachingAllocator:
    """The allocator of one device, seen from one stream. Its fields are those of `Replay`, as of now.

    Args:
        settings: of the allocator.
        capacity_bytes: what CUDA has to give; None: whatever is asked for.
    """

    def __init__(self, settings: AllocatorSettings, capacity_bytes: int | None = None) -> None:
        pool = _ExpandablePool if settings.expandable_segments else _SegmentPool
        max_split = settings.max_split_size_bytes or _NO_LIMIT
        self._small: _Pool = pool(True, max_split)
        self._large: _Pool = pool(False, max_split)
        self._capacity = _NO_LIMIT if capacity_bytes is None else capacity_bytes
        self._blocks: dict[int, tuple[_Pool, int, int]] = {}  # number -> (pool, address, bytes)
        self.allocated_bytes = 0
        self.allocated_peak_bytes = 0
        self.reserved_peak_bytes = 0
        self.reserved_at_allocated_peak_bytes = 0
        self.retries = 0

    @property
    def reserved_bytes(self) -> int:
        """Bytes asked of CUDA and not given back."""
        return self._small.reserved + self._large.reserved

    @property
    def segments(self) -> int:
        """Segments; of expandable ones, each mapped range."""
        return self._small.segments + self._large.segments

    def allocate(self, block: int, size: int) -> bool:
        """Find room for a block.

        Args:
            block: a number that no allocated block has.
            size: bytes, at least one.

        Returns:
            Whether there was room. If not, CUDA is out of memory, and all that could be given back was.

        Raises:
            ValueError: the block is allocated already.
        """
        if block in self._blocks:
            raise ValueError(f"block {block} is allocated already")
        wanted = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        pool = self._small if wanted <= SMALL_BYTES else self._large
        found = pool.take(wanted) or self._reserve(pool, wanted)
        if found is None:
            return False
        address = found[1]
        size = pool.split(wanted, found)
        self._blocks[block] = (pool, address, size)
        self.allocated_bytes += size
        if self.allocated_bytes > self.allocated_peak_bytes:
            self.allocated_peak_bytes = self.allocated_bytes
            self.reserved_at_allocated_peak_bytes = self.reserved_bytes
        return True

    def free(self, block: int) -> None:
        """Put a block into the cache.

        Raises:
            ValueError: the block is not allocated.
        """
        found = self._blocks.pop(block, None)
        if found is None:
            raise ValueError(f"block {block} is not allocated")
        pool, address, size = found
        self.allocated_bytes -= size
        pool.put(address, size)

    def _reserve(self, pool: "_Pool", wanted: int) -> Block | None:
        """Ask CUDA for more, giving back as much as is needed for it."""
        found = self._grow(pool, wanted)
        if found is None and pool.release_oversize(wanted):
            found = self._grow(pool, wanted)
        if found is None:
            self._large.release()
            self._small.release()
            self.retries += 1
            found = self._grow(pool, wanted)
        return found

    def _grow(self, pool: "_Pool", wanted: int) -> Block | None:
        found = pool.grow(wanted, self._capacity - self.reserved_bytes)
        # Mapping may have failed half-way: what it did map is reserved all the same.
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)
        return found


class _Pool(ABC):
    """Free blocks over an address space of the pool's own. Neighbours in a segment are next to each other, segments
    are not; so two free blocks that touch are always one.
    """

    def __init__(self, small: bool, max_split: int) -> None:
        self._segment_bytes = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        self._small = small
        self._max_split = max_split
        self._free: list[Block] = []  # ascending
        self._size_at: dict[int, int] = {}  # address of a free block -> its bytes
        self._start_of: dict[int, int] = {}  # end of a free block -> its address
        self.reserved = 0

    @property
    @abstractmethod
    def segments(self) -> int:
        """Ranges of addresses that are reserved."""

    @abstractmethod
    def grow(self, wanted: int, room: int) -> Block | None:
        """Reserve, within `room` bytes, what a block of `wanted` bytes needs, and take that block."""

    @abstractmethod
    def release(self) -> None:
        """Give back all that is not in use."""

    @abstractmethod
    def release_oversize(self, wanted: int) -> bool:
        """Give back blocks that may not be split, no more than make room for `wanted` bytes; whether that was done."""

    def take(self, wanted: int) -> Block | None:
        """Take the free block that fits best."""
        index = self._best_fit(bisect_left(self._free, (wanted,)))
        if index is None:
            return None
        block = size, address = self._free[index]
        if wanted < self._max_split <= size or (wanted >= self._max_split and size >= wanted + OVERSIZE_ROUNDING_BYTES):
            return None
        del self._free[index]
        del self._size_at[address], self._start_of[address + size]
        return block

    def split(self, wanted: int, block: Block) -> int:
        """Keep what a taken block has more than `wanted` bytes, if that is enough to be split off.

        Returns:
            Bytes of the block then.
        """
        size, address = block
        rest = size - wanted
        if not self._may_split(wanted, rest):
            return size
        self._insert(address + wanted, rest)  # what comes after it is not free: it would have been one with it
        return wanted

    def put(self, address: int, size: int) -> None:
        """Make a block free; with free neighbours it becomes one."""
        end = address + size
        after = self._size_at.get(end)
        if after is not None:
            self._remove(end, after)
            size += after
        before = self._start_of.get(address)
        if before is not None:
            length = address - before
            self._remove(before, length)
            address = before
            size += length
        self._insert(address, size)

    def _best_fit(self, smallest: int) -> int | None:
        """Index of the block to use, given that of the smallest that is large enough."""
        return smallest if smallest < len(self._free) else None

    def _may_split(self, wanted: int, rest: int) -> bool:
        if self._small:
            return rest >= BLOCK_BYTES
        return rest > SMALL_BYTES and wanted < self._max_split

    def _insert(self, address: int, size: int) -> None:
        insort(self._free, (size, address))
        self._size_at[address] = size
        self._start_of[address + size] = address

    def _remove(self, address: int, size: int) -> None:
        del self._free[bisect_left(self._free, (size, address))]
        del self._size_at[address], self._start_of[address + size]


class _SegmentPool(_Pool):
    """Each segment is one `cudaMalloc`, and one `cudaFree` once it is free as a whole."""

    def __init__(self, small: bool, max_split: int) -> None:
        super().__init__(small, max_split)
        self._segments: dict[int, int] = {}  # address -> bytes
        self._next_address = 0

    @property
    def segments(self) -> int:
        return len(self._segments)

    def grow(self, wanted: int, room: int) -> Block | None:
        size = self._segment_bytes
        if not self._small and wanted >= SHARED_BELOW_BYTES:
            size = -(-wanted // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES
        if size > room:
            return None
        address = self._next_address
        self._next_address += size + BLOCK_BYTES  # a gap: segments do not merge
        self._segments[address] = size
        self.reserved += size
        return size, address

    def release(self) -> None:
        for size, address in list(self._free):
            if self._segments.get(address) == size:
                self._give_back(address, size)

    def release_oversize(self, wanted: int) -> bool:
        enough = bisect_left(self._free, (wanted,))  # the best fit, which was not split: so it is a whole segment
        if enough < len(self._free):
            size, address = self._free[enough]
            self._give_back(address, size)
            return True
        released = 0
        while released < wanted and self._free and self._free[-1][0] >= self._max_split:
            size, address = self._free[-1]
            self._give_back(address, size)
            released += size
        return released >= wanted

    def _give_back(self, address: int, size: int) -> None:
        self._remove(address, size)
        del self._segments[address]
        self.reserved -= size


class _ExpandablePool(_Pool):
    """One range of addresses without end, of which pages are mapped where they are needed. What is not mapped are
    holes; the last one never ends.
    """

    def __init__(self, small: bool, max_split: int) -> None:
        super().__init__(small, max_split)
        self._holes: list[int] = [0]  # addresses, ascending
        self._hole_end: dict[int, int] = {0: _NO_LIMIT}

    @property
    def segments(self) -> int:
        return len(self._holes) - (self._holes[0] == 0)

    def grow(self, wanted: int, room: int) -> Block | None:
        address = self._lowest_room(wanted)
        end = address + self._size_at.get(address, 0)
        while end - address < wanted:  # a free block is before a hole, or a hole is first
            missing = -(-(wanted - (end - address)) // self._segment_bytes) * self._segment_bytes
            size = min(missing, self._hole_end[end] - end)
            if size > room:
                return None  # what was mapped so far stays
            room -= size
            self._map(end, size)
            end = address + self._size_at[address]
        self._remove(address, end - address)
        return end - address, address

    def release(self) -> None:
        page = self._segment_bytes
        for size, address in list(self._free):
            end = address + size
            first, last = -(-address // page) * page, end // page * page
            if first >= last:
                continue
            self._remove(address, size)
            if address < first:
                self._insert(address, first - address)
            if last < end:
                self._insert(last, end - last)
            self._unmap(first, last)

    def release_oversize(self, wanted: int) -> bool:
        return False  # only whole segments are given back so

    def _best_fit(self, smallest: int) -> int | None:
        # A block counts as large as it can become; later ones are tried only as long as they can become less.
        if smallest >= len(self._free):
            return None
        index = smallest
        reach = self._reach(index)
        while index + 1 < len(self._free) and (following := self._reach(index + 1)) < reach:
            index, reach = index + 1, following
        return index

    def _reach(self, index: int) -> int:
        size, address = self._free[index]
        end = address + size
        return self._hole_end.get(end, end) - address

    def _may_split(self, wanted: int, rest: int) -> bool:
        return rest >= BLOCK_BYTES

    def _lowest_room(self, wanted: int) -> int:
        """The lowest address of free blocks and holes in a row that are `wanted` bytes together."""
        for hole in self._holes:
            address = end = self._start_of.get(hole, hole)
            while end - address < wanted:
                if end in self._size_at:
                    end += self._size_at[end]
                elif end in self._hole_end:
                    end = self._hole_end[end]
                else:
                    break
            else:
                return address
        raise AssertionError("the last hole has no end")

    def _map(self, address: int, size: int) -> None:
        end = self._hole_end.pop(address)
        index = bisect_left(self._holes, address)
        if address + size < end:
            self._holes[index] = address + size
            self._hole_end[address + size] = end
        else:
            del self._holes[index]
        self.reserved += size
        self.put(address, size)

    def _unmap(self, address: int, end: int) -> None:
        self.reserved -= end - address
        index = bisect_left(self._holes, address)  # never beyond the last hole
        if self._holes[index] == end:
            end = self._hole_end.pop(self._holes.pop(index))
        if index and self._hole_end[self._holes[index - 1]] == address:
            self._hole_end[self._holes[index - 1]] = end
        else:
            self._holes.insert(index, address)
            self._hole_end[address] = end
