"""`MemoryPrediction`: what a config will need of each device and host, before it has run."""

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self


class Part(StrEnum):
    """What memory is used for. The parts of a breakdown add up to the peak."""

    PARAMETERS = "parameters"
    """Weights in the compute dtype and, where they differ, fp32 master weights."""
    GRADIENTS = "gradients"
    OPTIMIZER_STATES = "optimizer_states"
    ACTIVATIONS = "activations"
    """What the forward pass saves for the backward pass, and what either works in."""
    LOGITS = "logits"
    """Every tensor with a vocabulary dimension: logits, their fp32 copy, their softmax and gradients."""
    BUFFERS = "buffers"
    """Gathered parameters, reduction buckets, prefetches: what sharding works in."""
    CACHE = "cache"
    """Keys and values of past tokens (`task: generate`)."""
    FRAGMENTATION = "fragmentation"
    """Reserved by the caching allocator beyond what tensors use."""
    CONTEXT = "context"
    """CUDA context, communicators and workspaces, which no tensor owns."""
    HOST = "host"
    """Offloaded to main memory; on a CPU, where that is the device's, part of the peak like the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPrediction:
    """Peaks of the fullest rank. Every figure is bytes."""

    allocated_bytes: int
    """Live tensors."""
    reserved_bytes: int
    """Held by the caching allocator; equal to allocated where there is none (CPU)."""
    device_used_bytes: int
    """Of the device, everything: what decides whether the config fits."""
    host_bytes: int
    """Of one node's main memory, over all its ranks: offloaded states and their pinned buffers."""
    breakdown: dict[Part, int]
    """Parts of `device_used_bytes` at the peak."""
    deviation: float
    """Standard deviation of `device_used_bytes`, as a ratio of it."""
    gpu: int = 0
    """Which GPU of the process is the fullest, from 0 on."""
    layers_of_gpus: tuple[int, ...] = ()
    """How many layers each GPU of a process has; empty where a process has one."""

    def fit_probability(self, capacity_bytes: float) -> float:
        """Probability (0..1) that the peak stays within `capacity_bytes` of the device, the error taken as normal."""
        spread = self.device_used_bytes * self.deviation
        if not spread:
            return float(self.device_used_bytes <= capacity_bytes)
        return 0.5 * (1 + math.erf((capacity_bytes - self.device_used_bytes) / (spread * math.sqrt(2))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What was predicted of a trial before it ran; the store keeps it beside what was measured."""

    device_used_bytes: int
    """Peak of the fullest rank, of the device, everything."""
    deviation: float
    """Standard deviation of `device_used_bytes`, as a ratio of it."""
    tokens_per_second_per_gpu: float | None = None
    """None where the hardware's speed is not known."""
    parts: dict[str, float] | None = None
    """Seconds of an optimizer step by part (`autotune.predict.roofline.TimePart`); None like the throughput, and where
    a version that did not keep them has stored it."""
    issue_seconds: float | None = None
    """That the processor needs to issue the step's kernels; None like `parts`, and where it is a cost for itself."""
    proposal: dict[str, float | int | None] | None = None
    """What the sampler expected after the trials before it (`autotune.search.expected_improvement.Proposal`); None
    where another sampler, or the file, chose the trial."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**fields)
