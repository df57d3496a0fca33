"""`FakeData`: a FakeTensorMode for training steps. It answers where a step reads data, and remembers results.

PyTorch's own mode caches results too, for every kind of tensor there is. In a training step tensors are strided and
sizes are fixed, so that far less decides on a result, and looking it up is what most of a trace's time goes into.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch._guards import CompileContext
from torch._ops import HigherOrderOperator
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    _BypassDispatchCache,
    _DispatchCacheKey,
    in_kernel_invocation_manager,
)

CPU = torch.device("cpu")
"""FakeTensors of a device that PyTorch was not built for end the process, so the step runs the kernels of the CPU."""

_META = torch.device("meta")
_DEVICE: Any = torch.ops.prim.device.default
_ITEM: Any = torch.ops.aten._local_scalar_dense.default
_AS_STRIDED: Any = torch.ops.aten.as_strided.default
_VIEW: Any = torch.ops.aten.view.default
_VIEW_DTYPE: Any = torch.ops.aten.view.dtype
_UNSAFE_VIEW: Any = torch.ops.aten._unsafe_view.default
_WAIT: Any = torch.ops._c10d_functional.wait_tensor.default


class _Made(NamedTuple):
    """How a result is made again."""

    returned: int | None = None
    """Which argument it is, of an operator that works in place."""
    viewed: int | None = None
    """Which argument it is a view of."""
    shape: Any = ()
    stride: Any = ()
    offset: int = 0
    """Elements in the storage, behind the beginning of the viewed argument."""
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    constant: Any = None
    """What it is if it is no tensor."""

    @classmethod
    def of(cls, known: Any, args: Any) -> "_Made":
        """What PyTorch's own cache knows of a result.

        Raises:
            _BypassDispatchCache: it is a tensor of a kind that training steps do not have.
        """
        if known.inplace_idx is not None:
            return cls(returned=known.inplace_idx)
        data = known.metadata
        if data is None:
            return cls(constant=known.constant_value)
        if data.is_conj or data.is_neg or data.requires_grad:
            raise _BypassDispatchCache("a tensor of another kind")
        begin = 0 if known.view_idx is None else args[known.view_idx].storage_offset()
        offset = data.storage_offset - begin
        return cls(None, known.view_idx, data.shape, data.stride, offset, data.dtype, data.device)


class _Several(NamedTuple):
    """How a list or tuple of results is made again."""

    kind: type[list[Any] | tuple[Any, ...]]
    each: tuple[_Made, ...]


class FakeData(FakeTensorMode):  # type: ignore[no-untyped-call]  # its metaclass hook has no annotations
    """A mode that knows an answer when a value is read, and is quicker about what is asked most.

    Buffers are made real (`build_model`) and become fake when they are moved to the device.
    """

    supports_higher_order_operators = True

    _results: ClassVar[dict[tuple[object, ...], _Made | _Several | None]] = {}
    """By operator and arguments, of all modes; None where it has to be found anew each time."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # `_results` in its place
        # Memory of which tensor became which, by weak references, with which `Module._apply` cannot replace parameters.
        converter: Any = self.fake_tensor_converter
        converter.set_tensor_memo = lambda tensor, fake: None
        self._attributes = dict(vars(FakeTensor(self, torch.empty(0, device="meta"), CPU)), fake_mode=None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if CompileContext.try_get() is not None:  # torch.compile has a mode of its own
            return func(*args, **(kwargs or {}))
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # autograd asks each tensor: most of all calls
            return args[0].fake_device
        if isinstance(func, HigherOrderOperator):  # in compiled code
            operator: Any = func
            return self.dispatch(operator, types, args, kwargs or {})
        if func is _ITEM and isinstance(args[0], FakeTensor) and args[0].constant is None:
            # Booleans, and DeepSpeed's bytes, ask for trouble (an overflow, a NaN); there is none. Norms are positive.
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else int(dtype not in (torch.bool, torch.uint8))
        if func is _WAIT:  # PyTorch's own mode makes a tensor here that a step does not have
            return args[0]
        if func is _UNSAFE_VIEW:  # shares its argument's storage like any other
            func = _VIEW
        if func is _AS_STRIDED and type(args[0]) is FakeTensor and not kwargs:
            return self._view(*args)
        kwargs = kwargs or {}
        if func.namespace == "c10d":  # of a process group that does nothing: returns what it was given
            with in_kernel_invocation_manager(self):
                return func(*args, **kwargs)
        parts: list[object] = [func._op, torch.get_default_dtype()]  # an overload's own hash is slow
        try:
            if func is _VIEW_DTYPE:  # counts the offset in elements of another size
                parts.append(args[0].storage_offset())
            _add_to_key(parts, args)
            if kwargs:
                _add_to_key(parts, kwargs.items())
        except _BypassDispatchCache:
            return self.dispatch(func, types, args, kwargs)
        key = tuple(parts)
        made = self._results.get(key)
        if made is None:
            result = self.dispatch(func, types, args, kwargs)
            if key not in self._results:
                self._results[key] = self._how_made(func, args, kwargs, result)
            return result
        if isinstance(made, _Several):
            return made.kind([self._made_again(each, args) for each in made.each])
        return self._made_again(made, args)

    def _view(self, tensor: FakeTensor, shape: Any, stride: Any, offset: int | None = None) -> Any:
        """What `as_strided` returns. It cuts flat buffers, each time elsewhere, so that there is nothing to know."""
        begin = 0 if offset is None else offset - int(tensor.storage_offset())
        return self._made_again(_Made(None, 0, shape, stride, begin, tensor.dtype, tensor.fake_device), (tensor,))

    def _how_made(self, func: Any, args: Any, kwargs: Any, result: Any) -> "_Made | _Several | None":
        """How to make a result, or each of several, again; None where that is not known."""
        state: Any = vars(fake_tensor)["_CacheKeyState"](None)
        several: Any = tuple(result) if isinstance(result, list) else result
        try:
            entry = self._make_cache_entry(state, _DispatchCacheKey(()), func, args, kwargs, several)
            made = tuple(_Made.of(known, args) for known in entry.output_infos)
        except _BypassDispatchCache:
            return None
        return _Several(list if isinstance(result, list) else tuple, made) if entry.is_output_tuple else made[0]

    def _made_again(self, made: _Made, args: Any) -> Any:
        """A known result. PyTorch's own does the same in three times the time."""
        if made.dtype is None:
            return made.constant if made.returned is None else args[made.returned]
        meta = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device=_META)
        if made.viewed is not None:
            viewed = args[made.viewed]
            meta.set_(viewed.untyped_storage(), viewed.storage_offset() + made.offset, made.shape, made.stride)
        fake = torch.Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=made.device
        )
        torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)
        vars(fake).update(self._attributes, fake_mode=self, _fake_device=made.device)
        return fake

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: see `MemoryTracker`."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: no wrapper around each call that keeps torch.compile out; nothing is compiled here."""
        return False


_PLAIN = frozenset((int, bool, float, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format))


def _add_to_key(parts: list[object], args: Any) -> None:
    """What decides on a result.

    Raises:
        _BypassDispatchCache: a tensor of a kind of which more decides.
    """
    parts.append(len(args))
    for arg in args:
        kind = type(arg)
        if kind is FakeTensor and arg.constant is None and arg.layout is torch.strided:
            parts += (arg.dtype, arg.shape, arg.stride(), arg.fake_device)
        elif kind in _PLAIN:
            parts += (kind, arg)  # 1 and 1.0 are equal and mean different things
        elif isinstance(arg, torch.Tensor):
            raise _BypassDispatchCache("a tensor of another kind")
        elif isinstance(arg, (list, tuple)):
            parts.append(kind)
            _add_to_key(parts, arg)
        else:
            parts += (kind, arg)
