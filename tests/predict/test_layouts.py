"""Layouts: terms by hand on a small model, and what must move them."""

from dataclasses import replace

import pytest

from autotune.predict.device import CUDA_CONTEXT_BYTES, communicator_bytes
from autotune.predict.layouts import TRAINER_PROFILES, Layout, impossible, predict_layout, stage_blocks
from autotune.predict.shape import read_shape
from autotune.spec.prediction import MemoryPrediction, Part

LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SHAPE = read_shape("m", LLAMA)
ALONE = Layout(
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    data_parallel_size=1,
    zero_stage=0,
    micro_batch_size=1,
    gradient_accumulation_steps=32,
    sequence_length=2048,
    gpus_per_node=8,
)
NANOTRON = TRAINER_PROFILES["nanotron"]


def predict(layout: Layout = ALONE, profile: str = "nanotron") -> MemoryPrediction:
    """The fullest stage."""
    stages = predict_layout(SHAPE, layout, TRAINER_PROFILES[profile], "H100-80GB")
    return max(stages, key=lambda stage: stage.device_used_bytes)


def test_one_gpu_holds_eighteen_bytes_a_parameter_and_bf16_gradients() -> None:
    found, parameters = predict().breakdown, SHAPE.num_parameters
    assert found[Part.PARAMETERS] == 6 * parameters
    assert found[Part.OPTIMIZER_STATES] == 8 * parameters
    assert found[Part.GRADIENTS] == (4 + 2) * parameters
    assert found[Part.BUFFERS] == 0


def test_activations_and_logits_by_hand() -> None:
    found, tokens = predict().breakdown, 2048
    layer = 8 * 1024 + 4 * 1024 + 4 * 1024 + 4 * 16 + 8 * 4096
    assert found[Part.ACTIVATIONS] == tokens * (16 * layer + 2 * 1024 + 8 * 4096)
    assert found[Part.LOGITS] == tokens * 32768 * 8


def test_zero_shards_master_weights_and_adam_alone_and_needs_no_buckets() -> None:
    many = replace(ALONE, data_parallel_size=8)
    plain, zero = predict(many).breakdown, predict(replace(many, zero_stage=1)).breakdown
    assert plain[Part.BUFFERS] == 2 * SHAPE.num_parameters  # DistributedDataParallel's
    assert zero[Part.BUFFERS] == 0
    assert zero[Part.OPTIMIZER_STATES] == pytest.approx(SHAPE.num_parameters, rel=1e-6)
    assert zero[Part.GRADIENTS] == plain[Part.GRADIENTS]


def test_zero_gathers_parameters_where_activations_are_small() -> None:
    tiny = replace(ALONE, data_parallel_size=8, zero_stage=1, sequence_length=8)
    found = predict(tiny).breakdown
    assert found[Part.BUFFERS] == 4 * SHAPE.num_parameters + SHAPE.num_parameters // 4
    assert found[Part.ACTIVATIONS] == found[Part.LOGITS] == 0


def test_the_parts_add_up_and_reserved_is_no_less_than_allocated() -> None:
    for profile in TRAINER_PROFILES:
        for tensor in (1, 4):
            for stages in (1, 4):
                for zero_stage in (0, 1):
                    layout = replace(ALONE, tensor_parallel_size=tensor, pipeline_parallel_size=stages)
                    found = predict(replace(layout, data_parallel_size=2, zero_stage=zero_stage), profile)
                    assert sum(found.breakdown.values()) == found.device_used_bytes
                    assert found.allocated_bytes <= found.reserved_bytes <= found.device_used_bytes
                    assert min(found.breakdown.values()) >= 0


def test_tensor_parallelism_divides_what_it_can() -> None:
    whole, split = predict(), predict(replace(ALONE, tensor_parallel_size=8))
    for part in (Part.PARAMETERS, Part.ACTIVATIONS, Part.LOGITS):
        assert split.breakdown[part] == pytest.approx(whole.breakdown[part] / 8, rel=0.01)
    assert split.breakdown[Part.BUFFERS] == 2 * 2 * 1024 * 2048


def test_the_first_stage_holds_as_many_micro_batches_as_there_are_stages() -> None:
    two, four = (predict(replace(ALONE, pipeline_parallel_size=stages)).breakdown for stages in (2, 4))
    assert four[Part.ACTIVATIONS] == pytest.approx(two[Part.ACTIVATIONS], rel=0.15)
    once = predict(replace(ALONE, pipeline_parallel_size=4, gradient_accumulation_steps=1)).breakdown
    assert once[Part.ACTIVATIONS] < four[Part.ACTIVATIONS] / 2


def test_checkpointing_leaves_the_inputs_of_layers() -> None:
    found = predict(replace(ALONE, activation_checkpointing="full")).breakdown
    layer = 8 * 1024 + 4 * 1024 + 4 * 1024 + 4 * 16 + 8 * 4096
    assert found[Part.ACTIVATIONS] == 2048 * (17 * 2 * 1024 + layer + 8 * 4096)


def test_stages_end_with_the_block_that_passes_their_share() -> None:
    # A layer costs 4·h² + 3·h·I = 16 Mi, the lm head 32 Mi: 18 layers' worth, so 9 are a half and a tenth exceeds it.
    assert stage_blocks(SHAPE, 2, True) == ((10, True, False), (6, False, True))
    assert stage_blocks(SHAPE, 4, False) == ((4, True, False), (4, False, False), (4, False, False), (4, False, True))
    assert sum(layers for layers, _, _ in stage_blocks(SHAPE, 32, True)) == 16


def test_megatron_needs_less_than_nanotron_for_the_same_layout() -> None:
    layout = replace(ALONE, tensor_parallel_size=2, data_parallel_size=4, zero_stage=1)
    assert predict(layout, "megatron").device_used_bytes < predict(layout).device_used_bytes


def test_one_process_has_no_communicator() -> None:
    alone, two = predict(), predict(replace(ALONE, data_parallel_size=2))
    assert alone.device_used_bytes - alone.reserved_bytes == CUDA_CONTEXT_BYTES
    groups = 3  # world, node, data-parallel
    assert two.device_used_bytes - two.reserved_bytes - CUDA_CONTEXT_BYTES == groups * communicator_bytes(
        "H100-80GB", 2
    )


def test_nvlink_sharp_costs_on_hopper_alone() -> None:
    assert communicator_bytes("H100-80GB", 8) - communicator_bytes("A100-80GB", 8) == 1_610_612_736  # as NCCL prints it
    assert communicator_bytes("H100-80GB", 2) == communicator_bytes("A100-80GB", 2)


@pytest.mark.parametrize(
    ("changes", "profile", "word"),
    [
        ({"tensor_parallel_size": 32}, "nanotron", "num_attention_heads"),
        ({"pipeline_parallel_size": 3}, "megatron", "pipeline_parallel_size 3"),
    ],
)
def test_impossible_layouts_say_why(changes: dict[str, int], profile: str, word: str) -> None:
    reason = impossible(SHAPE, replace(ALONE, **changes), TRAINER_PROFILES[profile])  # type: ignore[arg-type]
    assert reason is not None
    assert word in reason


def test_experts_are_refused() -> None:
    sparse = LLAMA | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 512,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    reason = impossible(read_shape("sparse", sparse), ALONE, NANOTRON)
    assert reason is not None
    assert "experts" in reason
