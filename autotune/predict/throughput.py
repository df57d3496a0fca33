"""How long one optimizer step of a trial takes: DDP, FSDP2 and DeepSpeed's ZeRO, with offload and checkpointing.

With the letters of `roofline.py`, for a micro-batch:

    elementwise         also the casts of fp32 weights, where an engine keeps such
    accumulation        bytes of adding gradients to their sum
    recomputation       the forward pass of what is checkpointed
    launch              max(0, the processor's seconds to issue the work - the GPU's to do it)

and for the step:

    gradient reduction  max(0, reduction - the backward pass that hides it), where an engine hides it
    parameter gather    of ZeRO-1 and 2 after the update; of FSDP2 and ZeRO-3 for each layer, max(0, gather - the layer)
    optimizer           bytes of norm, clipping, AdamW and copy
    offload             gradients and parameters over PCIe, and the processor's Adam

Left out: the data loader, logging, evaluation, checkpoints, clocks that fall with heat, slow ranks, other jobs.
Sources: torch/distributed/fsdp/_fully_shard, DeepSpeed runtime/zero/stage_1_and_2.py and stage3.py, accelerate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from autotune.predict.kernels import Values, peak_flops
from autotune.predict.network import Counts, group, host_link, network
from autotune.predict.roofline import (
    EAGER_SCORE_BYTES,
    TRANSFORMERS_KERNELS,
    KernelProfile,
    LayerWork,
    Parts,
    TimePart,
    flops_per_token,
    total,
)
from autotune.predict.shape import DecoderShape
from autotune.predict.step import (
    ADAM_BYTES,
    BUCKET_BYTES,
    ISSUE_SECONDS,
    OPERATOR_SECONDS,
    StepTimes,
    counts,
    in_buckets,
    stretch,
)
from autotune.space.space import Space
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.workload import Workload

HOST_ADAM_SECONDS = 0.22e-9
"""A parameter of a node, DeepSpeed's CPU-Adam: 0.22 s for 10^9 (Ren et al., arXiv:2101.06840, table 4)."""
ZERO_3_OPERATORS = 20
"""A layer and pass: DeepSpeed's hooks before and after each of its modules. Judgement."""


@dataclass(frozen=True, slots=True)
class Trials:
    """Trial configs as columns of one length."""

    engine: NDArray[np.str_]
    precision: NDArray[np.str_]
    attention: NDArray[np.str_]
    offload: NDArray[np.str_]
    gpus: Counts
    zero_stage: Counts
    micro_batch: Counts
    accumulation: Counts
    length: Counts
    recomputed: Values
    """Share of the layers, 0..1, whose forward pass runs twice."""
    overlaps: NDArray[np.bool_]
    """DeepSpeed's `overlap_comm`; of no meaning to PyTorch's engine, which always overlaps."""

    @classmethod
    def of(cls, configs: Sequence[TrialConfig], workload: Workload, shape: DecoderShape) -> Self:
        """Columns of configs.

        Raises:
            ValueError: the global batch does not divide.
        """
        layers = len(shape.layers)

        def recomputed(config: TrialConfig) -> float:
            if config.activation_checkpointing == "selective":
                return len(range(0, layers, config.selective_every or 1)) / layers
            return float(config.activation_checkpointing == "full")

        overlap = "zero_optimization.overlap_comm"
        return cls(
            engine=np.array([config.engine for config in configs]),
            precision=np.array([config.precision for config in configs]),
            attention=np.array([config.attention for config in configs]),
            offload=np.array([config.offload for config in configs]),
            gpus=counts([config.gpus for config in configs]),
            zero_stage=counts([config.zero_stage for config in configs]),
            micro_batch=counts([config.micro_batch_size for config in configs]),
            accumulation=counts([workload.gradient_accumulation_steps(config) for config in configs]),
            length=counts([config.sequence_length for config in configs]),
            recomputed=np.array([recomputed(config) for config in configs], float),
            overlaps=np.array(
                [dict(config.deepspeed).get(overlap, config.zero_stage == 3) for config in configs], bool
            ),
        )

    @classmethod
    def of_candidates(cls, space: Space, shape: DecoderShape) -> tuple[Self, NDArray[np.int64]]:
        """Columns of those candidates of a space that can differ in time, and which of them each candidate is like."""
        overlap = "deepspeed.zero_optimization.overlap_comm"
        columns = space.columns
        axes = [axis for axis in space.axes if not axis.startswith("deepspeed.") or axis == overlap]
        _, firsts, kinds = np.unique(columns.kinds(axes), return_index=True, return_inverse=True)

        def values(axis: str) -> NDArray[Any]:
            found: NDArray[Any] = np.array(space.axes[axis])[columns[axis][firsts]]
            return found

        gpus, batch = values("gpus").astype(np.int64), values("micro_batch_size").astype(np.int64)
        layers, checkpointing = len(shape.layers), values("activation_checkpointing")
        every = np.where(checkpointing == "selective", values("selective_every"), layers)
        selected = np.where(checkpointing == "selective", np.ceil(layers / every) / layers, 0.0)
        zero_stage = values("zero_stage").astype(np.int64)
        overlaps = zero_stage == 3
        if overlap in axes:
            overlaps = np.where(columns[overlap][firsts] >= 0, values(overlap).astype(bool), overlaps)
        trials = cls(
            engine=values("engine"),
            precision=values("precision"),
            attention=values("attention"),
            offload=values("offload"),
            gpus=gpus,
            zero_stage=zero_stage,
            micro_batch=batch,
            accumulation=space.workload.global_batch_size // (batch * gpus),
            length=np.full(len(gpus), space.file.workload.sequence_length, np.int64),
            recomputed=np.where(checkpointing == "full", 1.0, selected),
            overlaps=overlaps,
        )
        return trials, kinds

    def __getitem__(self, chosen: NDArray[np.bool_]) -> "Trials":
        return Trials(*(getattr(self, field.name)[chosen] for field in fields(self)))


def predict_trials(
    shape: DecoderShape,
    trials: Trials,
    cluster: ClusterSpec,
    kernels: KernelProfile = TRANSFORMERS_KERNELS,
) -> StepTimes:
    """Step times of trials of one model.

    Args:
        shape: a dense model with equal layers.
        trials: N of them, legal ones.
        cluster: its GPUs, and how many share a node.
        kernels: of the library that runs the layers.

    Raises:
        UnknownHardwareError: the GPU's kernels or network are not known, or it lacks a precision.
    """
    count = len(trials.gpus)
    parts = {part: np.zeros(count) for part in TimePart}
    peak = np.zeros(count)
    kinds = np.stack([trials.engine, trials.precision, trials.attention], axis=1)
    for engine, precision, attention in np.unique(kinds, axis=0).tolist():
        chosen = (kinds == (engine, precision, attention)).all(axis=1)
        profile = replace(kernels, score_bytes=EAGER_SCORE_BYTES) if attention == "eager" else kernels
        found = _Sharded(shape, trials[chosen], cluster, profile, engine, precision).parts()
        for part, seconds in found.items():
            parts[part][chosen] = seconds
        peak[chosen] = peak_flops(cluster.gpu, precision)
    tokens = (trials.micro_batch * trials.length * trials.accumulation).astype(float)
    return StepTimes(parts, tokens, flops_per_token(shape, trials.length), peak)


class _Sharded:
    """Data-parallel trials with one engine, precision and attention."""

    def __init__(
        self,
        shape: DecoderShape,
        trials: Trials,
        cluster: ClusterSpec,
        kernels: KernelProfile,
        engine: str,
        precision: str,
    ) -> None:
        tokens, ones = (trials.micro_batch * trials.length).astype(float), np.ones(len(trials.gpus))
        self._shape, self._trials, self._kernels = shape, trials, kernels
        self._net, self._node = network(cluster.gpu), cluster.gpus_per_node
        self._gpu, self._deepspeed, self._value = cluster.gpu, engine == "deepspeed", 4 if precision == "fp32" else 2
        self._mixed = precision != "fp32"
        length = trials.length.astype(float)
        self._work = LayerWork(shape, cluster.gpu, kernels, precision, tokens, length, ones)
        self._ranks = group(trials.gpus, np.ones_like(trials.gpus), cluster.gpus_per_node)
        self._forward, self._backward = self._work.layer(backward=False), self._work.layer(backward=True)
        self._layers, self._parameters = len(shape.layers), float(shape.num_parameters)

    def parts(self) -> Parts:
        """Of the step."""
        trials, work, layers = self._trials, self._work, self._layers
        steps = trials.accumulation
        compute = {part: layers * (self._forward[part] + self._backward[part]) for part in self._forward}
        compute[TimePart.RECOMPUTATION] = trials.recomputed * layers * total(self._forward)
        compute[TimePart.LOGITS] = work.head(backward=False) + work.head(backward=True) + work.embedding_gradient()
        casts, sums = self._weight_bytes()
        compute[TimePart.ELEMENTWISE] = compute[TimePart.ELEMENTWISE] + work.memory(casts)
        compute[TimePart.ACCUMULATION] = work.memory(sums)
        compute[TimePart.LAUNCH] = np.maximum(self._issued() - total(compute), 0)
        result = {part: steps * seconds for part, seconds in compute.items()}
        forward = stretch(compute) * total(self._forward)
        backward = stretch(compute) * (total(self._backward) + trials.recomputed * total(self._forward))
        result[TimePart.GRADIENT_REDUCTION] = self._reduction(backward)
        result[TimePart.PARAMETER_GATHER] = self._gather(forward, backward)
        offloaded = trials.offload != "none"
        shards = np.where(trials.zero_stage > 0, trials.gpus, 1)
        update = work.memory(ADAM_BYTES * self._parameters / shards)
        result[TimePart.OPTIMIZER] = np.where(offloaded, 0.0, update)
        result[TimePart.OFFLOAD] = np.where(offloaded, self._offload(shards), 0.0)
        return result

    def _weight_bytes(self) -> tuple[Values, Values]:
        """Bytes of a micro-batch: weights cast for compute, gradients added to their sum.

        DeepSpeed's weights are in the compute dtype. DDP's are fp32 under autocast, which casts each weight and its
        gradient; FSDP2 casts shards.
        """
        held = 1.0 if self._deepspeed else np.where(self._trials.zero_stage > 0, self._trials.gpus, 1)
        casts = 0.0 if self._deepspeed or not self._mixed else 6 * self._parameters / held
        ddp = not self._deepspeed and self._mixed
        sums = np.where((self._trials.zero_stage == 0) & ddp, 18, 3 * self._value) * self._parameters
        return casts + np.zeros_like(sums), sums

    def _issued(self) -> Values:
        """Seconds that the processor needs to issue one micro-batch."""
        hooks = 2 * ZERO_3_OPERATORS * OPERATOR_SECONDS * (self._trials.zero_stage == 3) * self._deepspeed
        layer = ISSUE_SECONDS[0] * (1 + self._trials.recomputed) + ISSUE_SECONDS[1] + hooks
        return np.asarray(self._layers * layer)

    def _reduction(self, backward_layer: Values) -> Values:
        """Gradients summed over the ranks, beside layers of `backward_layer` seconds.

        DDP: fp32, in buckets, during the last backward pass. FSDP2: scattered layer by layer in the last one.
        DeepSpeed: stage 0 and 1 after the last one, 2 and 3 in each; hidden only with `overlap_comm`.
        """
        trials, net = self._trials, self._net
        size = self._value * self._parameters + np.zeros(len(trials.gpus))
        window = self._layers * backward_layer
        scatter = net.all_gather(self._ranks, size / self._layers)
        layer_by_layer = self._layers * np.maximum(scatter - backward_layer, 0) + scatter
        if not self._deepspeed:
            ddp = in_buckets(net, self._ranks, 4 * self._parameters + 0 * size, BUCKET_BYTES)
            ddp = np.maximum(ddp - window, net.all_reduce(self._ranks, np.full_like(size, BUCKET_BYTES)))
            return np.where(trials.zero_stage == 0, ddp, layer_by_layer)
        once = np.where(trials.zero_stage == 0, net.all_reduce(self._ranks, size), net.all_gather(self._ranks, size))
        exposed = np.where(trials.overlaps & (trials.zero_stage > 0), layer_by_layer, once)
        return np.where(trials.zero_stage >= 2, trials.accumulation, 1) * exposed

    def _gather(self, forward_layer: Values, backward_layer: Values) -> Values:
        """Sharded parameters gathered: for each layer forward, and backward at stage 3; below, after the step."""
        trials, net = self._trials, self._net
        size = self._value * self._parameters + np.zeros(len(trials.gpus))
        one = net.all_gather(self._ranks, size / self._layers)
        forward = self._layers * np.maximum(one - forward_layer, 0) + one
        backward = self._layers * np.maximum(one - backward_layer, 0)
        each = forward + np.where(trials.zero_stage == 3, backward, 0.0)
        after = net.all_gather(self._ranks, size)
        in_layers = (trials.zero_stage == 3) | ((trials.zero_stage == 2) & (not self._deepspeed))
        return np.where(trials.zero_stage == 0, 0.0, np.where(in_layers, trials.accumulation * each, after))

    def _offload(self, shards: Values | Counts) -> Values:
        """Gradients to the host, Adam there, parameters back; offloaded parameters once more for each pass."""
        trials, link = self._trials, host_link(self._gpu)
        share = self._parameters / shards
        on_node = np.minimum(trials.gpus, self._node)
        adam = HOST_ADAM_SECONDS * share * on_node
        down = np.where(trials.zero_stage >= 2, trials.accumulation, 1) * self._value * share / link
        passes = np.where(trials.offload == "optimizer+parameters", 2 * trials.accumulation, 0)
        return adam + down + (1 + passes) * self._value * share / link
