"""`MemoryTracker`: the bytes of live tensors, their peak, where it was, and a limit on them.

Counts storages, not tensors: views share one. It sees every tensor that an operator returns while the mode is on, on
any device, FakeTensors and the local parts of DTensors included, which makes one tracker serve three ends: a memory
limit that is exact to the byte on CPU, where there is no allocator to ask; the peak of a real CPU trial; and the
prediction of a step that was only traced.

A message that has been received holds nothing, whatever the threads of the library still do with it: see `messages`.

What it does not see: temporaries inside one operator, tensors made before it was entered and not touched since (their
storage counts from the first operator that returns them), memory that no tensor owns (contexts, workspaces, buffers of
the communication library), and an allocator's fragmentation.
"""

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch._C._distributed_c10d import Work
from torch._C._dynamo import guards
from torch._guards import CompileContext
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from autotune.modeling.messages import FUNCTIONAL, IN_FLIGHT, threads_work_on, unseen


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while entered. Enter once; threads are followed as PyTorch follows dispatch modes, backward included.

    Args:
        limit_bytes: live bytes above which an operator raises `torch.OutOfMemoryError`; None for no limit.
        round_to: each storage counts as a multiple of this. 512 is the block of CUDA's caching allocator.
    """

    supports_higher_order_operators = True
    """Those that compiled code is made of are operators like others."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: torch.compile compiles nothing under a mode that might change results."""
        return True

    def __init__(self, limit_bytes: int | None = None, round_to: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit_bytes = limit_bytes
        self.round_to = round_to
        self.peak_bytes = 0
        self.phase = ""
        """Name of what the caller is doing; the first half of a site."""
        self.sites: dict[tuple[str, str], int] = {}
        """Highest live bytes after each (phase, operator)."""
        self._live_bytes = 0
        self._storages: dict[int, int] = {}  # storage -> bytes counted
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def live_bytes(self) -> int:
        """Now."""
        IN_FLIGHT.let_go()
        return self._live_bytes

    def reset_peak(self) -> None:
        """Forget peak and sites; what is live stays counted."""
        self.peak_bytes = self.live_bytes
        self.sites.clear()

    def track(self, tensor: torch.Tensor) -> None:
        """Count `tensor`, which no operator has returned yet: a parameter or buffer made before the tracker."""
        self._count(tensor)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def __enter__(self) -> Self:
        # FSDP2 frees and restores unsharded parameters by resizing their storage, which is no operator.
        self._resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            if storage._cdata in self._storages:
                grown = self._recount(storage)
                self._note("resize_", grown)
            return result

        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign, assignment]
        self._wait = Work.wait
        # What wrapping `wait` hides is no memory of the trial: see `unseen`.
        Work.wait = unseen(self._wait)  # type: ignore[method-assign]  # patched on purpose while counting: no hook exists
        self._allocate = COMPILED.allocate
        COMPILED.allocate = self._allocate_and_count
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        COMPILED.allocate = self._allocate
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        Work.wait = self._wait  # type: ignore[method-assign]  # undoes the patch of `__enter__`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if CompileContext.try_get() is not None:  # torch.compile looks through code on tensors without memory
            return func(*args, **(kwargs or {}))
        IN_FLIGHT.let_go()
        call = IN_FLIGHT.send_functional if func in FUNCTIONAL else _call
        if threads_work_on(func, args):
            call = IN_FLIGHT.send
        result = call(func, args, kwargs or {})
        grown = sum(self._count(leaf) for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor))
        self._note(str(func), grown)
        return result

    def _allocate_and_count(self, *arguments: Any) -> torch.Tensor:
        tensor = self._allocate(*arguments)
        self._note("compiled", self._count(tensor))
        return tensor

    def _count(self, tensor: torch.Tensor) -> int:
        """Bytes by which live memory grew."""
        if is_traceable_wrapper_subclass(tensor):  # a DTensor owns nothing; its local tensor does
            names, _ = tensor.__tensor_flatten__()
            parts = (getattr(tensor, name) for name in names)
            return sum(self._count(part) for part in parts if isinstance(part, torch.Tensor))
        if tensor.layout is not torch.strided or tensor.is_meta:
            return 0
        return self._recount(tensor.untyped_storage())

    def _recount(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        size = -(-storage.nbytes() // self.round_to) * self.round_to
        known = self._storages.get(key)
        if known is None:
            # The storage's Python object lives exactly as long as the storage itself.
            self._watched[key] = weakref.ref(storage, lambda _: self._release(key))
        grown = size - (known or 0)
        self._storages[key] = size
        self._live_bytes += grown
        return grown

    def _release(self, key: int) -> None:
        self._live_bytes -= self._storages.pop(key)
        del self._watched[key]

    def _note(self, site: str, grown: int) -> None:
        """Record the live bytes after an operator that added `grown`, and refuse them if they are too many.

        Raises:
            torch.OutOfMemoryError: the limit is passed. The tensor dies with the exception, and is then uncounted.
        """
        if self.limit_bytes is not None and grown > 0 and self._live_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"Memory limit reached in {site}: tried to allocate {grown} bytes"
                f" on top of {self._live_bytes - grown} live bytes, with a limit of {self.limit_bytes} bytes."
            )
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        key = (self.phase, site)
        self.sites[key] = max(self.sites.get(key, 0), self._live_bytes)


class _Compiled:
    """Where compiled code gets its buffers from: `allocate`. It asks no operator, and keeps the function that it finds
    when it is loaded, whose calls are therefore handed on.
    """

    def __init__(self) -> None:
        module: Any = guards  # it is not in torch's annotations
        self.allocate: Callable[..., torch.Tensor] = module._empty_strided_cpu
        module._empty_strided_cpu = lambda *arguments: self.allocate(*arguments)


COMPILED = _Compiled()


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)
