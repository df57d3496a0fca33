"""`Recorder`: writes down each change of live memory during a step, cut into segments and named by what it is for."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from autotune.modeling.memory_tracker import MemoryTracker
from autotune.predict.segments import Change, Key, Kind, Standing
from autotune.spec.prediction import Part

_COLLECTIVES = ("c10d", "fsdp", "resize_")
"""Operators whose results are what sharding works in: gathered parameters and reduction buffers."""


class Recorder(MemoryTracker):  # type: ignore[no-untyped-call]
    """A `MemoryTracker` that keeps the changes themselves. It has no peak and no sites, which follow from them.

    Args:
        vocab_size: a tensor with this dimension is part of the logits.
        update_on_host: whether the optimizer updates offloaded states, so that what it works in is on the host.
        double_bytes: what the largest fp64 tensor is recorded as; None: as it is.
        gpu: whose tensors are recorded, of a process that has several; None for all.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        update_on_host: bool = False,
        double_bytes: int | None = None,
        gpu: int | None = None,
    ) -> None:
        super().__init__()
        self._gpu = gpu
        self._double_bytes = double_bytes
        self._doubles: set[int] = set()
        self._update_on_host = update_on_host
        self._vocab_size = vocab_size
        self._operator: Any = None  # the last one
        self._is_double = False  # whether what it made is of fp64
        self._part = Part.ACTIVATIONS
        self._blocks: list[tuple[str, int, int]] = []  # (operator, bytes, block)
        self._parts: dict[int, Part] = {}  # block -> what it is for
        self._numbers: dict[int, int] = {}  # storage -> block
        self._ends: dict[Key, int] = {}  # segment -> changes up to its end
        self._key: Key | None = None
        self._standing: dict[int, int] = {}  # block -> bytes

    def begin(self, standing: Mapping[Part, Iterable[torch.Tensor]]) -> dict[Part, int]:
        """Start recording; what lives now is standing.

        Args:
            standing: the tensors of each part; what is in none of them is buffers.

        Returns:
            Bytes of each part.
        """
        sizes: dict[Part, int] = {}
        seen: set[int] = set()
        for part, tensors in standing.items():
            for tensor in tensors:
                for storage in _storages(tensor):
                    if storage._cdata in self._storages and storage._cdata not in seen:
                        seen.add(storage._cdata)
                        self._parts[self._numbers[storage._cdata]] = part
                        sizes[part] = sizes.get(part, 0) + self._storages[storage._cdata]
        rest = self.live_bytes - sum(sizes.values())
        if rest:
            sizes[Part.BUFFERS] = sizes.get(Part.BUFFERS, 0) + rest
        self._blocks.clear()
        self._standing = {self._numbers[key]: size for key, size in self._storages.items() if size}
        return sizes

    def enter(self, micro_step: int, kind: Kind, layer: int = 0) -> None:
        """The changes from here on belong to this segment."""
        if self._key is not None:
            self._ends[self._key] = len(self._blocks)
        self._key = (micro_step, kind, layer)

    def name_all(self, living: Mapping[Part, Iterable[torch.Tensor]]) -> None:
        """Say what living tensors are for, where their making did not show it."""
        for part, tensors in living.items():
            for tensor in tensors:
                for storage in _storages(tensor):
                    number = self._numbers.get(storage._cdata)
                    if number is not None:
                        self._parts[number] = part

    def end(self) -> tuple[dict[Part, int], dict[Key, tuple[Change, ...]], tuple[Standing, ...]]:
        """Stop recording.

        Returns:
            Bytes of each part by which memory changed for good: what was made and kept, such as optimizer states, less
            what lived before and was given up. The changes without those, as a later step has them, which begins with
            what the first one left. And the blocks that live when it begins.
        """
        self.enter(-1, "after")
        self._resize_doubles()
        balance: Counter[int] = Counter()
        changes: Counter[int] = Counter()
        for _, size, block in self._blocks:
            balance[block] += size
            changes[block] += 1
        lasting = {block for block in balance if balance[block] and changes[block] == 1}
        earlier = self._returned(lasting)
        sizes: dict[Part, int] = {}
        found: dict[Key, tuple[Change, ...]] = {}
        begin = 0
        for key, end in self._ends.items():
            kept = []
            for operator, size, number in self._blocks[begin:end]:
                block, part = earlier.get(number, number), self._parts[number]
                if block in lasting:
                    sizes[part] = sizes.get(part, 0) + size
                    self._standing[block] = self._standing.get(block, 0) + size
                else:
                    kept.append(Change(operator, size, part, block))
            found[key], begin = tuple(kept), end
        standing = (Standing(block, size, self._parts[block]) for block, size in self._standing.items() if size)
        return sizes, found, tuple(standing)

    def _returned(self, lasting: set[int]) -> dict[int, int]:
        """Blocks that are made and kept in the place of one that stood and was given up before, to that one.

        So ZeRO-3 gives up what it keeps gathered when an update begins, and gathers it anew when that is over. Neither
        is lasting then: in between there is less.
        """
        gone: dict[tuple[int, Part], list[int]] = {}
        found: dict[int, int] = {}
        for _, size, block in self._blocks:
            if block not in lasting:
                continue
            equals = gone.setdefault((abs(size), self._parts[block]), [])
            if size < 0:
                equals.append(block)
            elif equals:
                found[block] = equals.pop(0)
        lasting.difference_update(found, found.values())
        return found

    def _resize_doubles(self) -> None:
        sizes = [size for _, size, block in self._blocks if block in self._doubles]
        if self._double_bytes is None or not sizes:
            return
        largest = max(sizes)
        for at, (operator, size, block) in enumerate(self._blocks):
            if block in self._doubles and abs(size) == largest:
                self._blocks[at] = (operator, self._double_bytes if size > 0 else -self._double_bytes, block)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if CompileContext.try_get() is not None:  # torch.compile looks through code
            return func(*args, **(kwargs or {}))
        if func is _DEVICE:  # autograd asks each tensor: most of all calls
            return args[0].fake_device if type(args[0]) is FakeTensor else func(*args)
        self._operator, self._is_double = func, False
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, torch.Tensor):
            self._count(result)
        else:
            for leaf in tree_iter(result):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: no wrapper around each call that keeps torch.compile out; nothing is compiled here."""
        return False

    def _count(self, tensor: torch.Tensor) -> int:
        if self._gpu is not None and (tensor.device.index or 0) != self._gpu:
            return 0
        if type(tensor) is not FakeTensor:
            self._describe(tensor)
            return super()._count(tensor)
        # Nothing is wrapped, and to ask through PyTorch for its device is dear.
        storage = tensor.untyped_storage()
        if tensor.fake_device.type == "meta" or self._storages.get(storage._cdata) == storage.nbytes():
            return 0  # a view, or changed in place: most of all
        self._describe(tensor)
        return self._recount(storage)

    def _describe(self, tensor: torch.Tensor) -> None:
        self._is_double = tensor.dtype is torch.float64
        self._part = Part.ACTIVATIONS
        if _name(self._operator).startswith(_COLLECTIVES):
            self._part = Part.BUFFERS
        elif self._update_on_host and self._key is not None and self._key[1] == "update":
            self._part = Part.HOST
        elif self._vocab_size in tensor.shape:
            self._part = Part.LOGITS

    def _recount(self, storage: torch.UntypedStorage) -> int:
        known = self._storages.get(storage._cdata, 0)
        grown = super()._recount(storage)
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._numbers[storage._cdata] = len(self._parts)
            self._parts[number] = self._part
        if grown:
            # A copy in fp64 is for a norm, and grows unlike others that the same operator makes.
            name = "to fp64" if self._is_double else _name(self._operator)
            if self._is_double:
                self._doubles.add(number)
            if known:
                self._blocks.append(("resize", -known, number))
            if known + grown:
                self._blocks.append((name, known + grown, number))
        return grown

    def _release(self, key: int) -> None:
        size = self._storages[key]
        super()._release(key)
        number = self._numbers.pop(key)
        if size:
            self._blocks.append(("free", -size, number))


_DEVICE: Any = torch.ops.prim.device.default


@functools.cache
def _name(operator: Any) -> str:
    """Made anew by each `str`."""
    return str(operator)


def _storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """Of a DTensor its local tensor's; of one that is several, such as numbers and their scales, all."""
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return [storage for part in parts if isinstance(part, torch.Tensor) for storage in _storages(part)]
    return [tensor.untyped_storage()] if tensor.layout is torch.strided and not tensor.is_meta else []
