"""What is carried on to a deep model against the trace of that model as a whole."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from autotune.predict.stream import Stream
from autotune.predict.structure import MAX_WHOLE_LAYERS
from autotune.predict.trace import record_trace, trace_stream
from autotune.spec.config import ActivationCheckpointing, Engine, Offload, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.nvme import AHEAD_KEYS
from autotune.spec.prediction import Part

DEPTH = 13
DEEP = ModelSpec(
    name="deep-qwen3",
    config={
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
)
BATCH, LENGTH = 6, 1024
"""Neither is traced."""
NOTHING_AHEAD: dict[str, Any] = {key.partition(".")[2]: 0 for key in AHEAD_KEYS}


def a_config(
    engine: Engine,
    zero_stage: int,
    checkpointing: ActivationCheckpointing = "full",
    offload: Offload = "none",
    *,
    gpus: int = 8,
    bucket: int = 2_000_000,
    tensor: int = 1,
    gathered: int = 1_500_000,
    **keys: Any,
) -> TrialConfig:
    stated: dict[str, Any] = {"zero_optimization.reduce_bucket_size": bucket} if engine == "deepspeed" else {}
    if zero_stage == 3 and engine == "deepspeed":  # less than three layers, as with a 32B model and DeepSpeed's own
        keys = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), gathered) | keys
    stated |= {f"zero_optimization.{key}": value for key, value in keys.items()}
    return TrialConfig(
        engine=engine,
        gpus=gpus,
        micro_batch_size=BATCH,
        sequence_length=LENGTH,
        zero_stage=zero_stage,
        offload=offload,
        tensor_parallel_size=tensor,
        activation_checkpointing=checkpointing,
        selective_every=2 if checkpointing == "selective" else None,
        deepspeed=tuple(stated.items()) if zero_stage else (),
    )


def peaks(config: TrialConfig, *, accumulates: bool) -> tuple[float, float]:
    """(predicted, of the whole trace), of the fuller of the first and the last rank."""
    ranks = {0, config.gpus - 1}
    at = np.array([BATCH]), np.array([LENGTH])
    carried = [trace_stream(DEEP, config, accumulates=accumulates, rank=rank) for rank in ranks]
    whole = [Stream.of(record_trace(DEEP, config, DEPTH, 3, 61, accumulates=accumulates, rank=rank)) for rank in ranks]
    first, second = (max(s.peak_bytes(*at, "cuda")[0] for s in streams) for streams in (carried, whole))
    return float(first), float(second)


@pytest.mark.parametrize(
    ("config", "accumulates"),
    [
        pytest.param(config, accumulates, marks=[pytest.mark.slow] if dear else [])
        for dear, config, accumulates in [
            (True, a_config("pytorch", 0), True),
            (True, a_config("pytorch", 0, "none", gpus=1), False),
            (True, a_config("pytorch", 2, "none"), True),
            (False, a_config("pytorch", 3, "selective"), False),
            (True, a_config("pytorch", 3), True),
            (True, a_config("deepspeed", 0), True),
            (True, a_config("deepspeed", 1), True),
            (True, a_config("deepspeed", 1, "none", "optimizer"), False),
            (True, a_config("deepspeed", 2), True),
            (False, a_config("deepspeed", 2, "none", bucket=100_000), False),
            (True, a_config("deepspeed", 2, "selective", gpus=2), True),
            (True, a_config("deepspeed", 2, "full", "optimizer"), True),
            (True, a_config("deepspeed", 3), False),
            (True, a_config("deepspeed", 3, "none", bucket=100_000), True),
            (True, a_config("deepspeed", 3, "full", "optimizer"), True),
            (True, a_config("deepspeed", 3, "none", "optimizer+parameters"), True),
            (True, a_config("deepspeed", 3, "full", "optimizer+parameters", gpus=1), True),
            (True, a_config("deepspeed", 3, "full", "optimizer_nvme+parameters"), True),
            (True, a_config("deepspeed", 3, "full", "optimizer_nvme+parameters_nvme", **NOTHING_AHEAD), True),
            (True, a_config("deepspeed", 3, "none", "optimizer_nvme+parameters_nvme", gpus=1, **NOTHING_AHEAD), False),
            (True, a_config("deepspeed", 3, sub_group_size=100_000), False),
            (False, a_config("deepspeed", 3, gathered=3_000_000), False),
            (True, a_config("deepspeed", 3, "selective", gathered=3_000_000), True),
            (True, a_config("deepspeed", 1, "none", tensor=2), True),
            (False, a_config("deepspeed", 2, tensor=2), False),
            (True, a_config("deepspeed", 3, tensor=2), True),
            (True, a_config("deepspeed", 3, zero_hpz_partition_size=4), True),
        ]
    ],
    ids=lambda value: value.describe() if isinstance(value, TrialConfig) else f"accumulates-{value}",
)
def test_a_deep_model_follows_from_shallow_traces(config: TrialConfig, accumulates: bool) -> None:
    assert DEPTH > MAX_WHOLE_LAYERS
    carried, whole = peaks(config, accumulates=accumulates)
    assert carried == pytest.approx(whole, rel=0.01)


def test_parts_are_named_and_add_up_to_the_peak() -> None:
    config = a_config("pytorch", 3)
    at = np.array([BATCH]), np.array([LENGTH])
    stream = trace_stream(DEEP, config, accumulates=True)
    parts = stream.breakdown(BATCH, LENGTH, "cuda")
    assert sum(parts.values()) == pytest.approx(stream.peak_bytes(*at, "cuda")[0], abs=16)
    parameters = DEEP.num_parameters
    assert parts[Part.PARAMETERS] == pytest.approx(4 * parameters / 8, rel=0.02)  # fp32, sharded
    assert parts[Part.OPTIMIZER_STATES] == pytest.approx(8 * parameters / 8, rel=0.02)
    # Between micro-steps that do not synchronise, the gradients of the whole model in bf16.
    assert 0.8 * 2 * parameters < parts[Part.GRADIENTS] < 2 * parameters * 1.1
    assert parts[Part.LOGITS] >= BATCH * LENGTH * DEEP.vocab_size * (2 + 4)


@pytest.mark.slow
def test_offloaded_states_are_the_hosts() -> None:
    parts = {
        offload: trace_stream(DEEP, a_config("deepspeed", 3, "full", offload), accumulates=True).breakdown(1, 8, "cuda")
        for offload in ("none", "optimizer", "optimizer+parameters")
    }
    share = DEEP.num_parameters / 8
    assert Part.HOST not in parts["none"]
    assert parts["none"][Part.OPTIMIZER_STATES] == pytest.approx(8 * share, rel=0.02)
    assert Part.OPTIMIZER_STATES not in parts["optimizer"]
    # fp32 masters, two moments, bf16 gradients; in the update fp32 gradients besides
    assert 14 * share * 0.98 < parts["optimizer"][Part.HOST] < 20 * share * 1.05
    assert parts["optimizer+parameters"][Part.HOST] - parts["optimizer"][Part.HOST] == pytest.approx(2 * share, rel=0.1)


def test_a_single_rank_copies_up_what_it_needs_of_offloaded_parameters() -> None:
    """On CPUs it has nothing to copy."""
    whole, one, eight = 2 * DEEP.num_parameters, np.array([1]), np.array([8])
    states, parameters = (
        trace_stream(DEEP, a_config("deepspeed", 3, "full", offload, gpus=1), accumulates=False)
        for offload in ("optimizer", "optimizer+parameters")
    )
    assert states.breakdown(1, 8, "cuda")[Part.PARAMETERS] == pytest.approx(whole, rel=0.02)
    on_host = [stream.breakdown(1, 8, "cuda")[Part.HOST] for stream in (states, parameters)]
    assert on_host[1] - on_host[0] == pytest.approx(whole, rel=0.1)
    peaks = [stream.peak_bytes(one, eight, "cuda")[0] for stream in (states, parameters)]
    assert 0.2 * whole < peaks[0] - peaks[1] < 0.9 * whole


def test_a_second_partition_is_two_bytes_a_parameter_over_its_ranks() -> None:
    parameters, ranks = DEEP.num_parameters, 4
    # As in a large model: a layer is let go of after its forward pass, and only norms are never.
    keys: dict[str, Any] = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), 200_000)
    config = a_config("deepspeed", 3, zero_hpz_partition_size=ranks, stage3_param_persistence_threshold=1000, **keys)
    found = trace_stream(DEEP, config, accumulates=False).breakdown(BATCH, LENGTH, "cuda")[Part.PARAMETERS]
    # At the peak the head is gathered, and let go of only later.
    copied = parameters - DEEP.vocab_size * DEEP.config["hidden_size"]
    assert found == pytest.approx((2 + 4) * parameters / 8 + 2 * copied / ranks, rel=0.01)


def test_what_lies_between_depends_on_depth_alone() -> None:
    deeper = dataclasses.replace(DEEP, config=DEEP.config | {"num_hidden_layers": 2 * DEPTH})
    config = a_config("pytorch", 2)
    at = np.array([1, 2]), np.array([64, 128])
    shallow_peaks = trace_stream(DEEP, config, accumulates=False).peak_bytes(*at, "cpu")
    deeper_peaks = trace_stream(deeper, config, accumulates=False).peak_bytes(*at, "cpu")
    assert (deeper_peaks > shallow_peaks).all()
