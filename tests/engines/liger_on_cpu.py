"""Liger's own kernels on a CPU, by Triton's interpreter, which runs a kernel's source with numpy.

Importing this mends what the interpreter lacks for Liger. `TRITON_INTERPRET=1` has to be in the environment when the
process starts: torch imports Triton early.
"""

import numpy as np
import triton
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def _convert_floats_too(argument: object) -> object:
    # A compiled kernel has them as scalars of its own, of which Liger's ask `.to`.
    if not isinstance(argument, float):
        return _convert(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)


@triton.jit
def _rsqrt(value):  # type: ignore[no-untyped-def]  # the source of a kernel
    return 1.0 / tl.sqrt(value)


interpreter._implicit_cvt = _convert_floats_too
rms_norm.rsqrt = _rsqrt  # libdevice's is a symbol of CUDA's library
