"""How long one optimizer step takes under tensor, pipeline and data parallelism, in other people's trainers.

With the letters of `roofline.py`, for a micro-batch on one stage:

    accumulation        bytes of adding gradients to their sum
    recomputation       the forward pass of what is checkpointed
    launch              max(0, the processor's seconds to issue the work - the GPU's to do it)
    tensor parallel     collectives of 2·n·h bytes. With sequence parallelism a layer gathers before and scatters after
                        attention and MLP, and gathers the two inputs once more backward (Korthikanti et al.,
                        arXiv:2205.05198, section 4.2); otherwise it sums over the ranks twice each way (Shoeybi et al.,
                        arXiv:1909.08053)
    pipeline transfer   2·n·h/t bytes to the next stage, and back

and for the step:

    bubble              1F1B: step = sum over stages + (accumulation steps - 1) x slowest stage (Narayanan et al.,
                        arXiv:2104.04473, section 2.2, for unequal stages)
    gradient reduction  max(reduction - the backward pass that hides it, what has to come after)
    parameter gather    of ZeRO-1, after the update
    optimizer           bytes of norm, clipping, AdamW and copy

Left out: the data loader, logging, evaluation, checkpoints, clocks that fall with heat, slow ranks, other jobs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from autotune.predict.kernels import Values, kernel_rates, peak_flops
from autotune.predict.layouts import Layout, stage_blocks
from autotune.predict.network import Counts, Group, group, network
from autotune.predict.roofline import (
    MEGATRON_KERNELS,
    NANOTRON_KERNELS,
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
    REENTRANT_PASSES,
    StepTimes,
    counts,
    in_buckets,
    stretch,
)
from autotune.spec.cluster import ClusterSpec

GATHERS = (4, 6)
"""Collectives of a layer with sequence parallelism, forward and backward."""
SUMS = (2, 2)
"""Without."""
CHECK_MESSAGES = 4
"""A rank and collective, where PyTorch compares over gloo what each rank is about to do: a barrier that rank 0 walks
there and back, and two gathers. Source: torch/csrc/distributed/c10d/ProcessGroupWrapper.cpp, `runCollectiveChecks`."""
MESSAGE_SECONDS = 50e-6
"""One way over TCP between processes of a cluster. Judgement: a round trip of 0.1 ms, as within a cloud's zone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """What a trainer of layouts does, beside its kernels."""

    kernels: KernelProfile
    sequence_parallel: bool
    """Tensor parallelism gathers and scatters; otherwise it sums over the ranks."""
    hides_tensor_parallel: bool
    """Backward, a column-parallel projection communicates beside the products of its gradients."""
    hides_reduction: bool
    """Without ZeRO, gradients are reduced during the last micro-batch's backward pass."""
    accumulation_bytes: int
    """A parameter and micro-batch."""
    gradient_bytes: int
    """A gradient that is reduced."""
    bucket_bytes: float = float("inf")
    """Reduced at once."""
    gathered_tensors: int = 0
    """A layer; after ZeRO-1's gather, each rank's share of each is copied by itself."""
    checks_collectives: bool = False
    """Runs under TORCH_DISTRIBUTED_DEBUG=DETAIL."""


_NANOTRON = StepProfile(
    kernels=NANOTRON_KERNELS,
    sequence_parallel=True,
    hides_tensor_parallel=True,
    hides_reduction=True,
    accumulation_bytes=10,
    gradient_bytes=4,
    bucket_bytes=2 * BUCKET_BYTES,  # the bucket counts bf16 gradients, the hook reduces their fp32 sums
    gathered_tensors=6,
)
STEP_PROFILES: dict[str, StepProfile] = {
    # trainer.py `training_step`, optim/gradient_accumulator.py `get_fp32_accum_hook`, optim/zero.py, distributed.py
    # `all_gather_coalesced`, at 67c5ebb6.
    "nanotron": _NANOTRON,
    # As its benchmarks were launched from 2025 on: run_multinode.sh at 77f54c10 exports TORCH_DISTRIBUTED_DEBUG=DETAIL.
    "nanotron-checked": replace(_NANOTRON, checks_collectives=True),
    "megatron": StepProfile(
        kernels=MEGATRON_KERNELS,
        sequence_parallel=False,
        hides_tensor_parallel=False,
        hides_reduction=False,
        accumulation_bytes=6,
        gradient_bytes=4,
    ),
}


@dataclass(frozen=True, slots=True)
class Layouts:
    """Layouts as columns of one length."""

    tensor: Counts
    stages: Counts
    replicas: Counts
    zero_stage: Counts
    micro_batch: Counts
    accumulation: Counts
    length: Counts
    checkpointed: NDArray[np.bool_]

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Self:
        """Columns of `Layout` objects."""
        return cls(
            tensor=counts([layout.tensor_parallel_size for layout in layouts]),
            stages=counts([layout.pipeline_parallel_size for layout in layouts]),
            replicas=counts([layout.data_parallel_size for layout in layouts]),
            zero_stage=counts([layout.zero_stage for layout in layouts]),
            micro_batch=counts([layout.micro_batch_size for layout in layouts]),
            accumulation=counts([layout.gradient_accumulation_steps for layout in layouts]),
            length=counts([layout.sequence_length for layout in layouts]),
            checkpointed=np.array([layout.activation_checkpointing == "full" for layout in layouts], bool),
        )

    def __getitem__(self, chosen: NDArray[np.bool_]) -> "Layouts":
        return Layouts(*(getattr(self, field.name)[chosen] for field in fields(self)))


def predict_layouts(
    shape: DecoderShape,
    layouts: Layouts,
    profile: StepProfile,
    cluster: ClusterSpec,
    *,
    by_cost: bool,
) -> StepTimes:
    """Step times of layouts of one model.

    Args:
        shape: a model that `layouts.impossible` lets pass.
        layouts: N of them, in bf16.
        profile: of the trainer.
        cluster: its GPUs, and how many share a node.
        by_cost: how layers are dealt to stages (`layouts.TrainerProfile`).

    Raises:
        UnknownHardwareError: the GPU's kernels or network are not known.
    """
    count = len(layouts.tensor)
    parts = {part: np.zeros(count) for part in TimePart}
    issue = np.zeros(count)
    for stages in np.unique(layouts.stages):
        chosen = layouts.stages == stages
        blocks = stage_blocks(shape, int(stages), by_cost)
        found, issue[chosen] = _Pipeline(shape, layouts[chosen], profile, cluster, blocks).parts()
        for part, seconds in found.items():
            parts[part][chosen] = seconds
    tokens = layouts.micro_batch * layouts.length * layouts.accumulation / (layouts.tensor * layouts.stages)
    peak = np.full(count, peak_flops(cluster.gpu, "bf16"))
    return StepTimes(parts, tokens, flops_per_token(shape, layouts.length), peak, issue)


class _Pipeline:
    """Layouts with one pipeline size."""

    def __init__(
        self,
        shape: DecoderShape,
        layouts: Layouts,
        profile: StepProfile,
        cluster: ClusterSpec,
        blocks: tuple[tuple[int, bool, bool], ...],
    ) -> None:
        tokens = (layouts.micro_batch * layouts.length).astype(float)
        self._shape, self._layouts, self._profile, self._blocks = shape, layouts, profile, blocks
        self._net, self._node = network(cluster.gpu), cluster.gpus_per_node
        self._launch_seconds = kernel_rates(cluster.gpu).launch_seconds
        self._tensor = layouts.tensor.astype(float)
        length = layouts.length.astype(float)
        self._work = LayerWork(
            shape, cluster.gpu, profile.kernels, "bf16", tokens, length, self._tensor, profile.sequence_parallel
        )
        self._sequence_bytes = 2 * tokens * shape.hidden_size
        self._tensor_group = group(layouts.tensor, np.ones_like(layouts.tensor), self._node)
        self._forward, self._backward = self._work.layer(backward=False), self._work.layer(backward=True)
        self._forward[TimePart.TENSOR_PARALLEL], self._backward[TimePart.TENSOR_PARALLEL] = self._layer_collectives()
        self._backward_seconds = total(self._backward) + layouts.checkpointed * total(self._forward)

    def parts(self) -> tuple[Parts, Values]:
        """Of the step; and what the processor needs to issue the micro-batches of the slowest stage."""
        stages = {block: self._stage(block) for block in set(self._blocks)}
        seconds = np.array([total(stages[block]) for block in self._blocks])
        slowest = np.argmax(seconds, axis=0)[None]
        steps = self._layouts.accumulation

        def of_slowest(of_each: Sequence[Values]) -> Values:
            return np.asarray(steps * np.take_along_axis(np.array(of_each), slowest, axis=0)[0])

        parts = {
            **{part: of_slowest([stages[block][part] for block in self._blocks]) for part in stages[self._blocks[0]]},
            TimePart.BUBBLE: seconds.sum(axis=0) - seconds.max(axis=0),
            **self._update(stages),
        }
        return parts, of_slowest([sum(self._issued(block), np.zeros_like(self._tensor)) for block in self._blocks])

    def _layer_collectives(self) -> tuple[Values, Values]:
        """What tensor parallelism adds to one layer's forward and backward pass."""
        if not self._profile.sequence_parallel:
            both = 2 * self._net.all_reduce(self._tensor_group, self._sequence_bytes)
            return both, both
        gather = self._net.all_gather(self._tensor_group, self._sequence_bytes)
        backward = 2 * gather
        for gradients in self._work.column_gradients():
            for product in gradients:
                hidden = product if self._profile.hides_tensor_parallel else 0.0
                backward = backward + np.maximum(gather - hidden, 0)
        return 4 * gather, backward

    def _stage(self, block: tuple[int, bool, bool]) -> Parts:
        """One stage and micro-batch."""
        layers, embeds, ends = block
        work, profile = self._work, self._profile
        parts = {part: layers * (self._forward[part] + self._backward[part]) for part in self._forward}
        parts[TimePart.RECOMPUTATION] = self._layouts.checkpointed * layers * total(self._forward)
        logits = np.zeros_like(self._tensor)
        gather = self._net.all_gather(self._tensor_group, self._sequence_bytes)
        if ends:
            logits = logits + work.head(backward=False) + work.head(backward=True)
        if embeds:
            logits = logits + work.embedding_gradient()
        parts[TimePart.LOGITS] = logits
        parts[TimePart.TENSOR_PARALLEL] = parts[TimePart.TENSOR_PARALLEL] + 2 * gather * (embeds + ends)
        parts[TimePart.ACCUMULATION] = work.memory(profile.accumulation_bytes * self._parameters(block))
        parts[TimePart.PIPELINE_TRANSFER] = self._transfer()
        ahead = layers * total(self._forward) + ends * (work.head(backward=False) + gather) + embeds * gather
        parts[TimePart.LAUNCH] = self._late(block, ahead, total(parts) - ahead)
        return parts

    def _late(self, block: tuple[int, bool, bool], forward: Values, backward: Values) -> Values:
        """What the processor needs longer to issue a micro-batch than the GPU for its two passes.

        A stage waits for what its neighbour sends before it issues a pass, so that the processor cannot run ahead from
        one into the next: nanotron reads the message's shape, Megatron-LM synchronises the device.
        """
        ahead, behind = self._issued(block)
        if len(self._blocks) == 1:
            return np.maximum(ahead + behind - forward - backward, 0)
        return np.maximum(ahead - forward, 0) + np.maximum(behind - backward, 0)

    def _issued(self, block: tuple[int, bool, bool]) -> tuple[Values, Values]:
        """Seconds that the processor needs to issue one micro-batch, forward and backward."""
        layers, embeds, ends = block
        check = CHECK_MESSAGES * (self._tensor - 1) * MESSAGE_SECONDS if self._profile.checks_collectives else 0.0
        collective = (self._tensor > 1) * (OPERATOR_SECONDS + check)
        ahead, behind = (
            layers * (seconds + count * collective)
            for seconds, count in zip(ISSUE_SECONDS, GATHERS if self._profile.sequence_parallel else SUMS, strict=True)
        )
        behind = behind + self._layouts.checkpointed * REENTRANT_PASSES * ahead
        outside = (3 * ends + embeds) * collective  # the loss and the head, or the embedding, in each pass
        return ahead + outside, behind + outside

    def _transfer(self) -> Values:
        if len(self._blocks) == 1:
            return np.zeros_like(self._tensor)
        far = self._layouts.tensor * self._layouts.replicas >= self._node
        return 2 * self._net.send(self._sequence_bytes / self._tensor, far=far)

    def _parameters(self, block: tuple[int, bool, bool]) -> Values:
        """Of a stage, as one rank holds them."""
        layers, embeds, ends = block
        ties = self._shape.tie_word_embeddings and embeds and ends
        matrices = layers * self._shape.layers[0].parameters + self._shape.embedding.parameters * (embeds + ends - ties)
        return matrices / self._tensor + self._shape.hidden_size * ends

    def _update(self, stages: dict[tuple[int, bool, bool], Parts]) -> Parts:
        """What happens once a step, on the stage with most parameters."""
        layouts, profile, net = self._layouts, self._profile, self._net
        largest = max(self._blocks, key=lambda block: float(self._parameters(block)[0]))
        parameters = self._parameters(largest)
        embedding = self._shape.embedding.parameters / self._tensor
        ranks = group(layouts.replicas, layouts.tensor, self._node)
        sharded = layouts.zero_stage == 1

        exposed = net.all_reduce(ranks, profile.gradient_bytes * parameters)
        if profile.hides_reduction:
            # The embedding's gradient is complete when the backward pass is over.
            last = net.all_reduce(ranks, profile.gradient_bytes * embedding * largest[1])
            buckets = in_buckets(net, ranks, profile.gradient_bytes * parameters, profile.bucket_bytes)
            window = largest[0] * self._backward_seconds * stretch(stages[largest])
            exposed = np.where(sharded, exposed, np.maximum(buckets - window, last))
        if self._shape.tie_word_embeddings and len(self._blocks) > 1:
            pair = Group(
                np.full_like(layouts.tensor, 2), np.where(layouts.replicas * layouts.tensor >= self._node, 2, 1)
            )
            exposed = exposed + net.all_reduce(pair, profile.gradient_bytes * embedding)
        copies = layouts.replicas * profile.gathered_tensors * largest[0] * self._launch_seconds
        gather = net.all_gather(ranks, 2 * parameters) + (layouts.replicas > 1) * copies
        shards = np.where(sharded, layouts.replicas, 1)
        return {
            TimePart.GRADIENT_REDUCTION: exposed,
            TimePart.PARAMETER_GATHER: np.where(sharded, gather, 0.0),
            TimePart.OPTIMIZER: self._work.memory(ADAM_BYTES * parameters / shards),
        }
