"""Compiled layers on FakeTensors: what torch's inductor makes of them, but for the kernels.

Inductor turns a layer into Python that takes buffers, runs kernels on them and gives them up again: what lives when is
decided there, by fusing and by choosing what the backward pass computes anew. That Python runs here as in a trial. Its
kernels are neither compiled, which takes a minute, nor called, as there is no data.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._dynamo import guards
from torch._inductor import config as inductor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.modeling.memory_tracker import COMPILED


@contextmanager
def separate_compilation() -> Iterator[None]:
    """What is compiled meanwhile knows only FakeTensors, and is forgotten on leaving."""
    torch._dynamo.reset()
    try:
        with fresh_cache(), inductor.patch(compile_threads=1):
            yield
    finally:
        torch._dynamo.reset()


def without_kernels(modes: Iterable[type[TorchDispatchMode]]) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, substitute) of what works on data; and of the code of `modes`, which is not to be compiled."""
    yield AsyncCompile, "cpp_pybinding", lambda *source: lambda *buffers: None
    yield COMPILED, "allocate", _buffer
    yield guards, "_reinterpret_tensor", _view
    for mode in modes:
        yield mode, "__torch_dispatch__", torch._dynamo.disable(mode.__torch_dispatch__)  # type: ignore[no-untyped-call]  # torch has not annotated it


def _buffer(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def _view(tensor: torch.Tensor, size: Any, stride: Any, offset: int) -> torch.Tensor:
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)
