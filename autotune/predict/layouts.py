"""Memory of pre-training under tensor, pipeline and data parallelism, by formula, for other people's trainers.

No trace: nanotron and Megatron-LM are not installed here, and their kernels are not Hugging Face's. Every term is read
from their source. Per GPU of one pipeline stage, with P parameters held there, dp the data-parallel size, z = dp where
ZeRO-1 shards the optimizer and 1 otherwise, t the tensor-parallel size, n = micro_batch_size x sequence_length tokens,
h hidden_size, Q and K query and key heads x head_dim, a heads, I the MLP's inner width, V vocab_size:

    parameters      2·P bf16 and 4·P/z fp32 master weights
    gradients       4·P summed in fp32 over the micro-batches, never sharded; 2·P bf16 from one backward pass
    optimizer       8·P/z Adam
    DDP buckets     2·P where torch's DistributedDataParallel wraps the model: dp > 1, no ZeRO
    all-gather      4·P + 2·P/dp at the end of ZeRO-1's optimizer step, when no activation lives: bf16 parameters
                    flattened by rank, once more in one piece by torch's all_gather, and this rank's own
    activations     n/t·(8·h + 4·Q + 4·K + 4·a + m·I) a layer and micro-batch in flight:
                    inputs of both norms and of the projections after them 8·h, each rank a share of the sequence;
                    rotated q and the result 4·Q, k and v 4·K, flash attention's log-sum-exp 4·a;
                    m = 8 for gate and up 4, activated gate 2, product 2; m = 6 where one kernel does both;
                    with full checkpointing 2·h·n/t, and one layer as above while it is recomputed
    embedding       2·h·n/t a micro-batch in flight on the first stage
    logits          V·n/t·(4 + 4) on the last: fp32 logits and softmax; 2 more in bf16 just before
    working set     8·I·n/t in the backward pass of one MLP; 2·h·n each for gathered activations and gradients (t > 1)
    communication   2 x 2·h·n a layer and micro-batch in flight (t > 1): the full-length results of the two row-parallel
                    projections go to NCCL's stream. PyTorch gives such a block back only after an event, by which
                    time the next activations lie elsewhere: each micro-batch in flight leaves these holes behind. What
                    is saved later goes into them, so they waste no more than is saved.
    context         the CUDA context, and an NCCL communicator each for world, node, t, p, dp and t x p

Stage i of p has min(p - i, accumulation steps) micro-batches in flight (1F1B, Narayanan et al., arXiv:2104.04473). The
fullest stage decides. Two terms are statements about the allocator, upper bounds that are its fragmentation here: the
communication holes, and that neither bf16 gradients nor logits fit into blocks that others left.

Left out: attention masks, rotary tables, the loader's batches, buffers of point-to-point messages.
Sources: Korthikanti et al., arXiv:2205.05198, section 4 (what a layer saves); NVIDIA/Megatron-LM core;
huggingface/nanotron, commit 67c5ebb6 of December 2024: models/llama.py, models/base.py `build_model`, trainer.py
`_init_model`, distributed.py, optim/gradient_accumulator.py, optim/zero.py, parallel/tensor_parallel/functional.py,
parallel/pipeline_parallel/engine.py.
"""

import functools
from dataclasses import dataclass
from typing import Literal

from autotune.predict.device import CUDA_CONTEXT_BYTES, communicator_bytes, workspace_bytes
from autotune.predict.shape import DecoderShape
from autotune.spec.prediction import MemoryPrediction, Part

DEVIATION = 0.08
"""Judgement, not measured: fragmentation is bounded, not replayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one training step is spread over GPUs and time."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    zero_stage: Literal[0, 1]
    micro_batch_size: int
    gradient_accumulation_steps: int
    sequence_length: int
    gpus_per_node: int
    activation_checkpointing: Literal["none", "full"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerProfile:
    """What a trainer does differently."""

    balances_by_cost: bool
    """A stage ends with the block that brings it past its share of the matrix multiplications, the lm head's included;
    otherwise every stage has as many layers."""
    ddp_buckets: bool
    """Without ZeRO, gradients pass through torch's DistributedDataParallel."""
    fused_accumulation: bool
    """Kernels add weight gradients to the fp32 sum themselves; otherwise they are bf16 until the backward pass ends."""
    flattens_gather: bool
    """ZeRO-1 gathers updated parameters through flat copies; otherwise in place."""
    mlp_bytes: int
    """The m of the module's formula."""
    logits_bytes: int
    """Values with a vocabulary dimension that live together at the loss."""
    cast_bytes: int
    """Of logits that are gone by then, but whose block is too small to be reused."""


_NANOTRON = TrainerProfile(
    balances_by_cost=True,
    ddp_buckets=True,
    fused_accumulation=False,
    flattens_gather=True,
    mlp_bytes=8,
    logits_bytes=8,
    cast_bytes=2,
)
TRAINER_PROFILES: dict[str, TrainerProfile] = {
    "nanotron": _NANOTRON,
    "nanotron-checked": _NANOTRON,  # differs in time alone: `layout_times.STEP_PROFILES`
    # Fused SwiGLU saves its input alone, the vocabulary-parallel loss works in place on one fp32 copy, and weight
    # gradients are added to `main_grad` by the kernel (gradient_accumulation_fusion).
    "megatron": TrainerProfile(
        balances_by_cost=False,
        ddp_buckets=False,
        fused_accumulation=True,
        flattens_gather=False,
        mlp_bytes=6,
        logits_bytes=6,
        cast_bytes=0,
    ),
}


def impossible(shape: DecoderShape, layout: Layout, profile: TrainerProfile) -> str | None:
    """Why the trainer refuses this layout of this model, or None."""
    tensor, stages, layers = layout.tensor_parallel_size, layout.pipeline_parallel_size, len(shape.layers)
    if not shape.dense:
        return f"model {shape.name} has experts, and layouts are predicted for dense decoders alone"
    if len(set(shape.layers)) > 1:
        return f"model {shape.name} has layers of several shapes, and layouts are predicted for equal ones"
    for name, size in (
        ("num_attention_heads", shape.num_attention_heads),
        ("num_key_value_heads", shape.num_key_value_heads),
        ("vocab_size", shape.vocab_size),
    ):
        if size % tensor:
            return f"tensor_parallel_size {tensor} does not divide {name} {size}"
    if not profile.balances_by_cost and layers % stages:
        return f"pipeline_parallel_size {stages} does not divide the {layers} layers of model {shape.name}"
    return None


@functools.lru_cache(maxsize=4096)
def stage_blocks(shape: DecoderShape, stages: int, by_cost: bool) -> tuple[tuple[int, bool, bool], ...]:
    """Layers, whether it embeds and whether it ends in the lm head and the loss, for each stage that has any block.

    By cost: blocks are the embedding (cost 0), the layers (their matrices) and the lm head (its matrix, tied or not),
    in this order; norms and the loss go with the block before them. nanotron's `build_model` moves on to the next stage
    after the block whose cumulative cost exceeds the stage's share.
    """
    layers = len(shape.layers)
    if not by_cost:
        return tuple((layers // stages, i == 0, i == stages - 1) for i in range(stages))
    costs = [layer.linear_parameters for layer in shape.layers] + [shape.embedding.parameters]
    total, cumulative, stage = sum(costs), 0, 0
    counts, head_stage = [0] * stages, 0
    for index, cost in enumerate(costs):
        if index < layers:
            counts[stage] += 1
        else:
            head_stage = stage
        cumulative += cost
        if cumulative > total * ((stage + 1) / stages):
            stage += 1
    return tuple((counts[i], i == 0, i == head_stage) for i in range(head_stage + 1))


def predict_layout(
    shape: DecoderShape, layout: Layout, profile: TrainerProfile, gpu: str
) -> tuple[MemoryPrediction, ...]:
    """Predict the stages that can be the fullest; the first one, where global rank 0 is, comes first.

    A stage like an earlier one has fewer micro-batches in flight and is left out.

    Args:
        shape: a model that `impossible` lets pass.
        layout: how it is trained.
        profile: by whom.
        gpu: its name in the table.
    """
    blocks = stage_blocks(shape, layout.pipeline_parallel_size, profile.balances_by_cost)
    first_like_it = {stage: index for index, stage in reversed(list(enumerate(blocks)))}
    order = sorted(first_like_it.items(), key=lambda item: item[1])
    return tuple(_stage(shape, layout, profile, gpu, index, stage) for stage, index in order)


def _stage(
    shape: DecoderShape,
    layout: Layout,
    profile: TrainerProfile,
    gpu: str,
    index: int,
    blocks: tuple[int, bool, bool],
) -> MemoryPrediction:
    layers, embeds, ends = blocks
    in_flight = min(layout.pipeline_parallel_size - index, layout.gradient_accumulation_steps)
    tensor, replicas = layout.tensor_parallel_size, layout.data_parallel_size
    tokens = layout.micro_batch_size * layout.sequence_length
    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    layer = shape.layers[0]
    shards = replicas if layout.zero_stage == 1 else 1

    matrices = layer.linear_parameters // tensor
    parameters = layers * (matrices + layer.parameters - layer.linear_parameters)
    ties = shape.tie_word_embeddings and embeds and ends
    parameters += shape.embedding.parameters // tensor * (embeds + ends - ties) + hidden * ends

    saved = 8 * hidden + 4 * shape.query_width + 4 * shape.key_value_width + 4 * shape.num_attention_heads
    saved = (saved + profile.mlp_bytes * layer.mlp_width) * tokens // tensor
    boundary = 2 * hidden * tokens // tensor
    checkpointed = layout.activation_checkpointing == "full"
    micro_batch = layers * (boundary if checkpointed else saved) + boundary * embeds
    activations = in_flight * micro_batch + (saved if checkpointed else 0)
    working = 8 * layer.mlp_width * tokens // tensor
    full_length = 2 * hidden * tokens if tensor > 1 else 0
    logits = profile.logits_bytes * vocabulary * tokens // tensor * ends

    buckets = 2 * parameters if profile.ddp_buckets and replicas > 1 and layout.zero_stage == 0 else 0
    backward_gradients = 0 if profile.fused_accumulation else 2 * parameters
    standing = 6 * parameters + 12 * parameters // shards + buckets
    workspace = workspace_bytes(gpu)

    # The largest of: the loss; the first layer of the backward pass; its end, with one micro-batch's activations gone.
    at_loss = activations + logits
    at_first_layer = activations + working
    at_end = activations - micro_batch + backward_gradients
    gathered = 4 * parameters + 2 * parameters // replicas if profile.flattens_gather and shards > 1 else 0
    step = activations + working + logits + backward_gradients
    holes = profile.cast_bytes * vocabulary * tokens // tensor * ends
    holes += min(2 * full_length, saved) * layers * in_flight
    fixed = standing + 2 * full_length + workspace
    live = fixed + max(at_loss, at_first_layer, at_end, gathered)
    reserved = fixed + max(step + holes, gathered)

    outside = CUDA_CONTEXT_BYTES + _communicators(layout, gpu)
    if gathered > step + holes:  # the optimizer step is the peak: what a micro-batch holds is gone
        activations = working = logits = backward_gradients = 0
    else:
        gathered = 0
    breakdown = {
        Part.PARAMETERS: 2 * parameters + 4 * parameters // shards,
        Part.GRADIENTS: 4 * parameters + backward_gradients,
        Part.OPTIMIZER_STATES: standing - buckets - 6 * parameters - 4 * parameters // shards,
        Part.ACTIVATIONS: activations + working,
        Part.LOGITS: logits,
        Part.BUFFERS: buckets + 2 * full_length + gathered,
        Part.CONTEXT: workspace + outside,
    }
    used = reserved + outside
    breakdown[Part.FRAGMENTATION] = used - sum(breakdown.values())
    return MemoryPrediction(
        allocated_bytes=live,
        reserved_bytes=reserved,
        device_used_bytes=used,
        host_bytes=0,
        breakdown=breakdown,
        deviation=DEVIATION,
    )


@functools.lru_cache(maxsize=4096)
def _communicators(layout: Layout, gpu: str) -> int:
    """NCCL's bytes. Neighbours in rank share a tensor group, then a data-parallel group, then a pipeline."""
    tensor, replicas, stages = layout.tensor_parallel_size, layout.data_parallel_size, layout.pipeline_parallel_size
    world, node = tensor * replicas * stages, layout.gpus_per_node

    def near(size: int, stride: int) -> int:
        return min(size, max(1, node // stride))

    groups = [
        (world, near(world, 1)),
        (near(world, 1), near(world, 1)),
        (tensor, near(tensor, 1)),
        (replicas, near(replicas, tensor)),
        (stages, near(stages, tensor * replicas)),
        (tensor * stages, near(tensor, 1) * near(stages, tensor * replicas)),
    ]
    return sum(communicator_bytes(gpu, ranks_on_node) for size, ranks_on_node in groups if size > 1)
