"""How long a GPU takes for one kernel: matrix products, attention, and what only moves memory.

    matrix product   seconds = t0 + max(2·(m + p)·(n + p)·(k + p) / (e·peak), b·(m·n + m·k + k·n) / (u·bandwidth))
        of an m x k and a k x n matrix of b bytes a value: a launch, then the slower of arithmetic and memory. p pads
        each side, for tiles that are not full and their prologues; e and u are the shares reached of the peaks.
    attention        seconds = FLOPs / (f·peak · s / (s + s0))
        flash attention over s positions reaches the share f of the peak for long sequences, half of it at s0.
    memory           seconds = bytes / (u·bandwidth)

`t0, p, e, u` are fitted by `benchmarks/fit_kernels.py`, 2026-11-24, to four fifths of the bf16 products with both outer
sides of at least 64 in the tables of ai-dynamo/aiconfigurator (Apache-2.0). On the other fifth, of products above 10
GFLOP, the median error is 4.6 % on H100, 5.2 % on H200 and 8.0 % on A100. f and s0: the curves of FlashAttention-2, on
H100 by Shah et al., arXiv:2407.08608, figures 5 and 6, on A100 by Dao, arXiv:2307.08691, figures 4 to 6.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.errors import UnknownHardwareError
from autotune.spec.cluster import GpuSpec

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRates:
    """What kernels reach on one kind of GPU; the letters are the module's."""

    launch_seconds: float
    """t0: from one kernel's end to the next one's, of a small product in a queue that never runs dry."""
    tile_padding: float
    """p, in rows."""
    matmul_efficiency: float
    """e, 0..1."""
    memory_efficiency: float
    """u, 0..1."""
    attention_forward_efficiency: tuple[float, float]
    """f, 0..1, for heads of 64 and of 128 values."""
    attention_backward_efficiency: tuple[float, float]
    attention_half_length: float = 300.0
    """s0, in tokens."""


_HOPPER_ATTENTION = ((0.31, 0.345), (0.30, 0.33))
_AMPERE_ATTENTION = ((0.60, 0.65), (0.50, 0.60))

_H100 = KernelRates(
    launch_seconds=5.0e-6,
    tile_padding=0.0,
    matmul_efficiency=0.815,
    memory_efficiency=0.886,
    attention_forward_efficiency=_HOPPER_ATTENTION[0],
    attention_backward_efficiency=_HOPPER_ATTENTION[1],
)
_H200 = KernelRates(
    launch_seconds=5.1e-6,
    tile_padding=4.7,
    matmul_efficiency=0.818,
    memory_efficiency=0.846,
    attention_forward_efficiency=_HOPPER_ATTENTION[0],
    attention_backward_efficiency=_HOPPER_ATTENTION[1],
)
_A100 = KernelRates(
    launch_seconds=5.9e-6,
    tile_padding=117.0,
    matmul_efficiency=0.903,
    memory_efficiency=0.745,
    attention_forward_efficiency=_AMPERE_ATTENTION[0],
    attention_backward_efficiency=_AMPERE_ATTENTION[1],
)
RATES: dict[str, KernelRates] = {
    "A100-40GB": _A100,
    "A100-80GB": _A100,
    "H100-80GB": _H100,
    "H200-141GB": _H200,
    # No table of these was found. They are taken to reach the same shares of their own peaks as the nearest relative.
    "H20-96GB": _H200,
    "B200-180GB": _H200,
    "L40S-48GB": _A100,
    "RTX-4090-24GB": _A100,
    "MI300X-192GB": _H100,
}


def kernel_rates(gpu: GpuSpec) -> KernelRates:
    """The rates of a GPU.

    Raises:
        UnknownHardwareError: nothing is known of its kernels.
    """
    if gpu.name not in RATES:
        raise UnknownHardwareError(
            f"GPU {gpu.name}: no time can be predicted, because how fast its kernels run is not known; measure it, or"
            f" use one of {', '.join(RATES)}"
        )
    return RATES[gpu.name]


def peak_flops(gpu: GpuSpec, precision: str) -> float:
    """FLOP/s of the matrix units.

    Raises:
        UnknownHardwareError: the GPU lacks the precision.
    """
    peak = gpu.peak_flops_per_second.get(precision)
    if peak is None:
        raise UnknownHardwareError(
            f"GPU {gpu.name} has no {precision}; use one of {', '.join(gpu.peak_flops_per_second)}"
        )
    return peak


def memory_seconds(gpu: GpuSpec, size: Values | float) -> Values:
    """Time to move `size` bytes to or from device memory, reads and writes added up."""
    bandwidth = gpu.memory_bandwidth_bytes_per_second
    if bandwidth is None:
        raise UnknownHardwareError(f"GPU {gpu.name}: its memory bandwidth is not known; use another GPU of the table")
    return np.asarray(size, float) / (kernel_rates(gpu).memory_efficiency * bandwidth)


def matmul_seconds(
    gpu: GpuSpec, precision: str, rows: Values | float, columns: Values | float, inner: Values | float
) -> Values:
    """One product of a `rows` x `inner` and an `inner` x `columns` matrix, all of one shape after broadcasting."""
    rates = kernel_rates(gpu)
    pad = rates.tile_padding
    arithmetic = 2 * (rows + pad) * (columns + pad) * (inner + pad)
    value = 4 if precision == "fp32" else 2
    moved = memory_seconds(gpu, value * (rows * columns + rows * inner + inner * columns))
    return rates.launch_seconds + np.maximum(arithmetic / (rates.matmul_efficiency * peak_flops(gpu, precision)), moved)


def attention_seconds(
    gpu: GpuSpec, precision: str, flops: Values, length: Values | float, head_dim: int, *, backward: bool
) -> Values:
    """Flash attention whose kernel skips what a causal mask hides.

    Args:
        gpu: where it runs.
        precision: of q, k and v.
        flops: that remain under the mask.
        length: tokens of a sequence.
        head_dim: between 64 and 128 the efficiency is interpolated; outside, the nearer one's.
        backward: the backward pass.
    """
    rates = kernel_rates(gpu)
    shares = rates.attention_backward_efficiency if backward else rates.attention_forward_efficiency
    share = np.interp(head_dim, (64, 128), shares) * length / (length + rates.attention_half_length)
    return rates.launch_seconds + flops / (share * peak_flops(gpu, precision))
