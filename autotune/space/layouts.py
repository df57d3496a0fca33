"""The rules of parallel layouts: what tensor, sequence and pipeline parallelism divide, and what they go with."""

import math

from autotune.space.rule import DEGREES, Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import REDUCE_SCATTER, SECOND_PARTITION, STAGES_PER_RANK, ZERO_QUANTIZED, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

SPLIT_MODEL_TYPES = ("qwen2", "qwen3", "llama")
"""Families whose layers our plan divides, each held against a single process by `tests/engines/test_layouts.py`."""


@reads("engine", "loss", *DEGREES)
def _engine(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.engine == "pytorch" or not config.has_own_layout:
        return None
    if config.pipeline_parallel_size == 1 and config.loss == "full_logits":
        return None  # AutoTP, Ulysses
    return f"{config.own_layout} is run by engine pytorch alone"


@reads(
    "engine",
    "tensor_parallel_size",
    "zero_stage",
    "activation_checkpointing",
    "method",
    "optimizer",
    f"deepspeed.{SECOND_PARTITION}",
)
def _auto_tensor(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    """What DeepSpeed's AutoTP trains wrong, or fails at (0.19.8, by `tests/engines/test_layouts.py`)."""
    if config.engine != "deepspeed" or config.tensor_parallel_size == 1:
        return None
    what = f"tensor_parallel_size {config.tensor_parallel_size} on engine deepspeed"
    if config.zero_stage == 0:
        return f"{what} clips by the norm of a rank's share where zero_stage is 0; use 1, 2 or 3"
    if config.activation_checkpointing == "selective_ops":
        # Ranks sum into the product that is kept, which is then summed once more.
        return f"{what} computes wrong gradients with activation_checkpointing selective_ops; use full or selective"
    if config.method != "full":
        return f"{what} needs gradients of all weights, and method {config.method} has frozen ones"
    if config.optimizer != "adamw":
        return f"{what} has not been tried with optimizer {config.optimizer}; use adamw"
    if int(dict(config.deepspeed).get(SECOND_PARTITION, 1)) > 1:
        return f"{what} does not go with {SECOND_PARTITION}, which takes neighbours in rank for copies of one another"
    return None


@reads(
    "engine",
    "sequence_parallel_size",
    "tensor_parallel_size",
    "zero_stage",
    "precision",
    *ZERO_QUANTIZED,
    f"deepspeed.{SECOND_PARTITION}",
    f"deepspeed.{REDUCE_SCATTER}",
)
def _shared_sequences(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    """What DeepSpeed's Ulysses trains wrong, or fails at (0.19.8, by `tests/engines/test_layouts.py`).

    The loss of transformers' Trainer, and of accelerate's and DeepSpeed's guides, gathers that of each piece so that
    the ranks' gradients sum up to as many times those of the mean as there are ranks. The reduce-scatter of ZeRO-3
    divides by all ranks, which is right then; everything else divides by the data-parallel ones.
    """
    size = config.sequence_parallel_size
    if config.engine != "deepspeed" or size == 1:
        return None
    what, keys = f"sequence_parallel_size {size} on engine deepspeed", dict(config.deepspeed)
    if config.zero_stage != 3:
        return f"{what} computes gradients {size} times too large with zero_stage {config.zero_stage}; use 3"
    if not keys.get(REDUCE_SCATTER, True):
        return f"{what} computes gradients {size} times too large without {REDUCE_SCATTER}"
    if config.tensor_parallel_size > 1:
        return (
            f"{what} does not go with tensor_parallel_size {config.tensor_parallel_size}:"
            " DeepSpeed takes the same neighbours in rank for both"
        )
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    if heads % size or (key_heads % size and size % key_heads):
        return f"{what} neither divides the {key_heads} key heads of {model.name} nor is a multiple of them"
    for field, value in {"precision": "fp16", **dict.fromkeys(ZERO_QUANTIZED, True)}.items():
        if getattr(config, field) == value:
            return f"{what} has not been tried with {field} {value}"
    if int(keys.get(SECOND_PARTITION, 1)) > 1:
        return f"{what} has not been tried with {SECOND_PARTITION}"
    return None


@reads("loss", *DEGREES)
def _family(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.has_own_layout:
        return None
    if model.model_type not in SPLIT_MODEL_TYPES:
        known = ", ".join(SPLIT_MODEL_TYPES)
        return f"{config.own_layout} is for models of type {known}, and {model.name} is {model.model_type}"
    if model.config.get("use_sliding_window"):
        return f"{config.own_layout} attends to whole sequences, and {model.name} has a sliding window"
    return None


@reads("engine", "tensor_parallel_size", "sequence_parallel_size", "sequence_length")
def _tensor(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    size = config.tensor_parallel_size
    if size == 1:
        return None
    divided = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
    }
    for name, count in divided.items():
        if count % size:
            return f"tensor_parallel_size {size} does not divide {name} {count} of {model.name}"
    if config.engine == "pytorch" and config.sequence_length % (size * config.sequence_parallel_size):
        return (
            f"tensor_parallel_size {size} x sequence_parallel_size {config.sequence_parallel_size}"
            f" does not divide sequence_length {config.sequence_length}"
        )
    return None


@reads("tensor_parallel_size", "sequence_parallel_size", "sequence_length", "attention")
def _sequence(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    size, tensor = config.sequence_parallel_size, config.tensor_parallel_size
    if size == 1:
        return None
    if config.sequence_length % size:
        return f"sequence_parallel_size {size} does not divide sequence_length {config.sequence_length}"
    if config.attention == "eager":
        return f"sequence_parallel_size {size} needs attention sdpa or a flash kernel, not eager"
    # Key heads are copied until the ranks divide them, and the query heads must still be a multiple of them.
    heads, keys = model.num_attention_heads // tensor, model.num_key_value_heads // tensor
    if heads % size or heads % max(1, keys * size // math.gcd(max(1, keys), size)):
        return (
            f"sequence_parallel_size {size} does not divide the {heads} query and {keys} key heads"
            f" that each tensor-parallel rank has of {model.name}"
        )
    return None


@reads("pipeline_parallel_size", "pipeline_schedule")
def _pipeline_layers(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.pipeline_parallel_size == 1:
        return None
    if config.pipeline_stages > model.num_hidden_layers:
        return (
            f"pipeline_parallel_size {config.pipeline_parallel_size} with schedule {config.pipeline_schedule}"
            f" has {config.pipeline_stages} stages for {model.num_hidden_layers} layers"
        )
    if model.tie_word_embeddings:
        return (
            f"pipeline_parallel_size {config.pipeline_parallel_size} parts the embedding from the head,"
            f" and {model.name} ties them"
        )
    return None


@reads("micro_batch_size", "gpus", "device_map", "pipeline_schedule", *DEGREES)
def _pipeline_batches(config: TrialConfig, workload: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    size = config.pipeline_parallel_size
    if size == 1:
        return None
    try:
        batches = workload.gradient_accumulation_steps(config)
    except ValueError:  # another rule's
        return None
    if batches < size:
        return f"pipeline_parallel_size {size} is more than the {batches} micro-batches of an optimizer step"
    per_rank = STAGES_PER_RANK[config.pipeline_schedule or "1f1b"]
    if per_rank > 1 and batches % (batches // size):
        # torch/distributed/pipelining/schedules.py: rounds of equal numbers of micro-batches
        return (
            f"pipeline_schedule {config.pipeline_schedule} cannot deal {batches} micro-batches"
            f" in {batches // size} equal rounds to {size} ranks"
        )
    return None


@reads("engine", "zero_stage", "gpus", "device_map", "pipeline_schedule", *DEGREES)
def _zero(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.engine != "pytorch" or config.model_parallel_size == 1 or config.gpus % config.model_parallel_size:
        return None
    if config.zero_stage and config.replicas == 1:
        return f"zero_stage {config.zero_stage} shards over data and sequence parallel ranks, and there is only one"
    if not config.zero_stage and config.replicas > 1 and config.tensor_parallel_size > 1:
        return (
            f"zero_stage 0 replicates by DDP, which does not know the matrices that tensor_parallel_size"
            f" {config.tensor_parallel_size} shares; use 2 or 3"
        )
    if config.pipeline_schedule == "zero_bubble" and config.replicas > 1 and config.zero_stage != 2:
        # Seen in tests/engines/test_layouts.py: with 0 and 3 gradients come out wrong, and nothing fails.
        return f"pipeline_schedule zero_bubble computes wrong gradients with zero_stage {config.zero_stage}; use 2"
    return None


@reads("pipeline_schedule", "activation_checkpointing", "pipeline_parallel_size")
def _split_backward(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.pipeline_schedule == "zero_bubble" and config.activation_checkpointing == "selective_ops":
        # torch/utils/checkpoint.py: "only allowed to backward once on any region computed under selective …"
        return (
            "pipeline_schedule zero_bubble goes back twice, which activation_checkpointing selective_ops does not allow"
        )
    return None


@reads("engine", "zero_stage", "gpus", "device_map", "data_parallel_replicate_size", *DEGREES)
def _groups(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    groups = config.data_parallel_replicate_size
    if groups == 1:
        return None
    if config.engine != "pytorch":
        return (
            f"data_parallel_replicate_size {groups} is FSDP2's, on engine pytorch;"
            f" the key zero_optimization.zero_hpz_partition_size is DeepSpeed's"
        )
    if config.zero_stage not in (2, 3):
        return f"data_parallel_replicate_size {groups} shards within each group, by zero_stage 2 or 3"
    if config.data_parallel_size % groups:
        return f"data_parallel_replicate_size {groups} does not divide data_parallel_size {config.data_parallel_size}"
    if config.shards == 1:
        return f"data_parallel_replicate_size {groups} leaves one rank a group, which shards nothing; use zero_stage 0"
    return None


@reads("precision", *DEGREES)
def _loss_scale(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.precision == "fp16" and config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        return "precision fp16 has a loss scale that tensor and pipeline parallel ranks do not agree on; use bf16"
    return None


LAYOUT_RULES: tuple[Rule, ...] = (
    _engine,
    _auto_tensor,
    _shared_sequences,
    _family,
    _tensor,
    _sequence,
    _pipeline_layers,
    _pipeline_batches,
    _zero,
    _groups,
    _split_backward,
    _loss_scale,
)
