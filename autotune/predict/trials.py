"""`Trials`: configs as columns, with what their step times depend on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from autotune.predict.kernels import Values
from autotune.predict.network import Counts
from autotune.predict.shape import DecoderShape
from autotune.predict.step import counts
from autotune.space.space import Space
from autotune.spec.config import (
    SECOND_PARTITION,
    SHORT_STATES,
    STAGES_PER_RANK,
    WITHIN_SEQUENCES,
    PipelineSchedule,
    TrialConfig,
)
from autotune.spec.workload import Workload

BATCHED = ("batching", "micro_batch_size", "attention")
"""The axes that decide on what a micro-batch computes."""
SHARED = ("tensor", "sequence", "pipeline")
OVERLAP = "zero_optimization.overlap_comm"
IDLE: dict[PipelineSchedule, float] = {"1f1b": 1.0, "interleaved_1f1b": 1 / 2, "zero_bubble": 1 / 6}
"""What a schedule idles, in bubbles of 1F1B."""


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
    keeps_products: NDArray[np.bool_]
    """Of all layers what runs twice is all but products and attention."""
    overlaps: NDArray[np.bool_]
    """DeepSpeed's `overlap_comm`; of no meaning to PyTorch's engine, which always overlaps."""
    second_partition: Counts
    """Ranks that ZeRO-3 divides a second copy of the parameters over (hpZ); 1 where there is none."""
    tensor: Counts
    """Ranks that share matrices."""
    sequence: Counts
    """Ranks that share sequences."""
    stages: Counts
    """Ranks that share the layers."""
    stages_of_rank: Counts
    idle: Values
    """Of a pipeline, in bubbles of 1F1B."""
    chunked: NDArray[np.bool_]
    """The loss."""
    tiled: NDArray[np.bool_]
    """The MLPs."""
    groups: Counts
    """Of replicas that FSDP2 shards within."""
    real: Values
    """Share of the tokens, 0..1, that are no padding."""
    rank: Counts
    """Of LoRA's adapters; 0 where all weights train."""
    on_attention: NDArray[np.bool_]
    """Adapters are beside the matrices of attention."""
    on_mlp: NDArray[np.bool_]
    quantized: NDArray[np.bool_]
    """The matrices are held in 4 bits."""
    short_states: NDArray[np.bool_]
    """Adam's states have 8 bits."""
    in_turn: Counts
    """GPUs of one process, which have some of the layers each and work one after another."""

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

        rows, length, real = batches(workload, configs)
        gpus = counts([config.gpus for config in configs])
        return cls(
            engine=np.array([config.engine for config in configs]),
            precision=np.array([config.precision for config in configs]),
            attention=np.array([config.attention for config in configs]),
            offload=np.array([config.offload for config in configs]),
            gpus=gpus,
            zero_stage=counts([config.zero_stage for config in configs]),
            micro_batch=rows,
            accumulation=counts([workload.gradient_accumulation_steps(config) for config in configs]),
            length=length,
            recomputed=np.array([recomputed(config) for config in configs], float),
            keeps_products=np.array([config.activation_checkpointing == "selective_ops" for config in configs], bool),
            overlaps=np.array(
                [dict(config.deepspeed).get(OVERLAP, config.zero_stage == 3) for config in configs], bool
            ),
            second_partition=np.clip(
                counts([int(dict(config.deepspeed).get(SECOND_PARTITION, 1)) for config in configs]), 1, gpus
            ),
            tensor=counts([config.tensor_parallel_size for config in configs]),
            sequence=counts([config.sequence_parallel_size for config in configs]),
            stages=counts([config.pipeline_parallel_size for config in configs]),
            stages_of_rank=counts([config.pipeline_stages // config.pipeline_parallel_size for config in configs]),
            idle=np.array([IDLE[config.pipeline_schedule or "1f1b"] for config in configs]),
            chunked=np.array([config.loss == "chunked" for config in configs], bool),
            tiled=np.array([config.tiled_mlp for config in configs], bool),
            groups=counts([config.data_parallel_replicate_size for config in configs]),
            real=real,
            rank=counts([config.lora_rank or 0 for config in configs]),
            on_attention=np.array(
                [config.lora_target_modules in ("all-linear", "attention") for config in configs], bool
            ),
            on_mlp=np.array([config.lora_target_modules in ("all-linear", "mlp") for config in configs], bool),
            quantized=np.array([config.method == "qlora" for config in configs], bool),
            short_states=np.array([config.optimizer in SHORT_STATES for config in configs], bool),
            in_turn=counts([config.gpus_per_rank for config in configs]),
        )

    @classmethod
    def of_candidates(cls, space: Space, shape: DecoderShape) -> tuple[Self, NDArray[np.int64]]:
        """Columns of those candidates of a space that can differ in time, and which of them each candidate is like."""
        overlap, partition = f"deepspeed.{OVERLAP}", f"deepspeed.{SECOND_PARTITION}"
        columns = space.columns
        axes = [axis for axis in space.axes if not axis.startswith("deepspeed.") or axis in (overlap, partition)]
        _, firsts, kinds = np.unique(columns.kinds(axes), return_index=True, return_inverse=True)

        def values(axis: str) -> NDArray[Any]:
            found: NDArray[Any] = np.array(space.axes[axis])[columns[axis][firsts]]
            return found

        gpus, batch = values("gpus").astype(np.int64), values("micro_batch_size").astype(np.int64)
        tensor, sequence, stages = (values(f"{kind}_parallel_size").astype(np.int64) for kind in SHARED)
        in_turn = np.where(values("device_map") == "auto", gpus, 1)
        schedules = values("pipeline_schedule")
        layers, checkpointing = len(shape.layers), values("activation_checkpointing")
        every = np.where(checkpointing == "selective", values("selective_every"), layers)
        selected = np.where(checkpointing == "selective", np.ceil(layers / every) / layers, 0.0)
        adapted, targets = values("method") != "full", values("lora_target_modules")
        zero_stage = values("zero_stage").astype(np.int64)
        overlaps = zero_stage == 3
        if overlap in axes:
            overlaps = np.where(columns[overlap][firsts] >= 0, values(overlap).astype(bool), overlaps)
        second = np.ones_like(gpus)
        if partition in axes:
            stated = np.where(columns[partition][firsts] >= 0, values(partition).astype(np.int64), 1)
            second = np.clip(stated, 1, gpus)
        _, examples, alike = np.unique(columns.kinds(BATCHED)[firsts], return_index=True, return_inverse=True)
        rows, length, real = batches(space.workload, [space.candidates[int(at)] for at in firsts[examples]])
        rows, length, real = rows[alike], length[alike], real[alike]
        trials = cls(
            engine=values("engine"),
            precision=values("precision"),
            attention=values("attention"),
            offload=values("offload"),
            gpus=gpus,
            zero_stage=zero_stage,
            micro_batch=rows,
            accumulation=space.workload.global_batch_size // (batch * (gpus // (tensor * sequence * stages * in_turn))),
            length=length,
            recomputed=np.where(checkpointing == "full", 1.0, selected),
            keeps_products=checkpointing == "selective_ops",
            overlaps=overlaps,
            second_partition=second,
            tensor=tensor,
            sequence=sequence,
            stages=stages,
            stages_of_rank=np.where(stages > 1, [STAGES_PER_RANK[name] for name in schedules.tolist()], 1),
            idle=np.array([IDLE[name] for name in schedules.tolist()]),
            chunked=values("loss") == "chunked",
            tiled=values("tiled_mlp").astype(bool),
            groups=values("data_parallel_replicate_size").astype(np.int64),
            real=real,
            rank=np.where(adapted, values("lora_rank").astype(np.int64), 0),
            on_attention=adapted & (targets != "mlp"),
            on_mlp=adapted & (targets != "attention"),
            quantized=values("method") == "qlora",
            short_states=np.isin(values("optimizer"), SHORT_STATES),
            in_turn=in_turn,
        )
        return trials, kinds

    def __getitem__(self, chosen: NDArray[np.bool_]) -> "Trials":
        return Trials(*(getattr(self, field.name)[chosen] for field in fields(self)))


def computed_shape(config: TrialConfig, workload: Workload) -> tuple[int, int]:
    """(rows, tokens of a row) that an average micro-batch computes on, padding included.

    A flash kernel attends within each packed sequence, as if it had a row of its own, each of the mean length: that
    their squares are longer on average is left out, and of FlexAttention that it works on blocks of 128 positions.
    Other kernels attend along the whole row.
    """
    if config.batching == "packed" and config.attention in WITHIN_SEQUENCES:
        return config.micro_batch_size, round(workload.mean_length(config))
    return workload.expected_shape(config)


def batches(workload: Workload, configs: Sequence[TrialConfig]) -> tuple[Counts, Counts, Values]:
    """Rows, tokens of a row, and the share of these that is no padding, of the average micro-batch of each config."""
    rows, length = np.array([computed_shape(config, workload) for config in configs], np.int64).T
    real = [config.micro_batch_size * workload.mean_length(config) for config in configs]
    return rows, length, np.array(real) / (rows * length)
