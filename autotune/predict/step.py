"""What the step times of layouts (`layout_times.py`) and of trials (`throughput.py`) share.

Everything is columns, so that 250,000 candidates take a second; `StepTimes.at` gives a single one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.predict.kernels import Values
from autotune.predict.network import Counts, Group, Network
from autotune.predict.roofline import Parts, TimePart, total

ISSUE_SECONDS = (0.86e-3, 0.84e-3)
"""For the processor to issue one decoder layer in eager PyTorch, forward and backward. Measured by
`benchmarks/fit_kernels.py` on 2026-11-24: transformers 5.23, Qwen3 with sdpa, tensors too small to count, torch 2.13 on
one core of an AMD EPYC virtual machine; 92 ATen operators forward and 178 backward. Fused kernels save operators, and
Python functions around them cost as much, so that other libraries are taken to need the same."""
OPERATOR_SECONDS = 10e-6
"""One operator of these, forward."""
ADAM_BYTES = 46
"""A parameter: gradient's norm 4 and clipping 8; parameter, gradient and two moments read 16, written 12; cast 6."""
BUCKET_BYTES = 25 * 2**20
"""Of torch's DistributedDataParallel, `bucket_cap_mb`."""


@dataclass(frozen=True, slots=True)
class TimePrediction:
    """Of one candidate."""

    step_time_seconds: float
    tokens_per_second_per_gpu: float
    model_flops_utilization: float
    """0..1; NaN where no peak is known (CPU)."""
    breakdown: dict[TimePart, float]
    """Seconds of the step."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of N candidates, in columns of N."""

    parts: Parts
    tokens_per_gpu: Values
    """That one step trains on, divided by the GPUs."""
    flops_per_token: Values
    peak_flops: Values
    """NaN where it is not known."""

    @property
    def step_seconds(self) -> Values:
        """Of one optimizer step."""
        return total(self.parts)

    @property
    def tokens_per_second_per_gpu(self) -> Values:
        """Throughput."""
        return self.tokens_per_gpu / self.step_seconds

    @property
    def model_flops_utilization(self) -> Values:
        """0..1, of the dense peak of the precision; NaN where it is not known."""
        return self.tokens_per_second_per_gpu * self.flops_per_token / self.peak_flops

    def of(self, which: NDArray[np.int64]) -> "StepTimes":
        """Those at some indexes, as often as they are named."""
        return StepTimes(
            {part: seconds[which] for part, seconds in self.parts.items()},
            self.tokens_per_gpu[which],
            self.flops_per_token[which],
            self.peak_flops[which],
        )

    def at(self, index: int) -> TimePrediction:
        """One candidate."""
        return TimePrediction(
            float(self.step_seconds[index]),
            float(self.tokens_per_second_per_gpu[index]),
            float(self.model_flops_utilization[index]),
            {part: float(seconds[index]) for part, seconds in self.parts.items()},
        )


def stretch(micro_batch: Parts) -> Values:
    """How much longer than its kernels a micro-batch takes because the processor is late, as a ratio."""
    whole = total(micro_batch)
    return whole / (whole - micro_batch[TimePart.LAUNCH])


def in_buckets(net: Network, ranks: Group, size: Values, bucket: float) -> Values:
    """Seconds to sum `size` bytes over the ranks in pieces of `bucket` bytes."""
    pieces = np.maximum(np.ceil(size / bucket), 1)
    return pieces * net.all_reduce(ranks, size / pieces)


def counts(values: Sequence[int]) -> Counts:
    """A column of integers."""
    return np.array(values, np.int64)
