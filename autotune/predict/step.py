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

ISSUE_SECONDS = (0.87e-3, 1.26e-3)
"""For the processor to issue one decoder layer in eager PyTorch, forward and backward. Qwen's documentation has
transformers on A100 generate 40.9 tokens/s with Qwen2-1.5B, 49.9 with 0.5B, 39.7 and 47.4 with Qwen2.5's, whatever the
context, which is 0.83 to 0.90 ms a layer and token (with Qwen3 on H20, 0.60). Backward is 1.45 times as long, by
`benchmarks/fit_kernels.py` on 2026-11-24, the median of seven runs: transformers 5.23, Qwen3 with sdpa, tensors too
small to count, torch 2.13 on one core of an AMD EPYC virtual machine; 92 ATen operators forward and 178 backward. Fused
kernels save operators, and Python functions around them cost as much, so that other libraries are taken to need the
same."""
REENTRANT_PASSES, HOOKED_PASSES = 1.93, 4.42
"""In how many forward passes' time recomputing a checkpointed layer is issued, with a backward pass inside
the backward pass (Megatron-LM) and with hooks on saved tensors (`use_reentrant=False`, our own). The same runs."""
OPERATOR_SECONDS = 10e-6
"""One operator of these, forward."""
ADAM_BYTES = 46
"""A parameter: gradient's norm 4 and clipping 8; parameter, gradient and two moments read 16, written 12; cast 6."""
SHORT_STATES_BYTES = 12
"""Of them, that states of 8 bits spare: two moments read and written in one byte each instead of four."""
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
    issue_seconds: Values | None = None
    """That the processor needs to issue the micro-batches' kernels; `TimePart.LAUNCH` is what of it they do not hide.
    None where that part is a cost for itself."""

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
            None if self.issue_seconds is None else self.issue_seconds[which],
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
