"""What stands for FlexAttention in a trace: it keeps what torch's own graph of it keeps, and a step is like sdpa's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers.masking_utils
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from autotune.modeling.memory_tracker import MemoryTracker
from autotune.predict import flex
from tests.engines.flex_on_cpu import flex_on_cpu
from tests.predict.test_fake import TINY
from tests.predict.test_layout_memory import BATCH, LENGTH, a_request, predicted

HEADS, KEY_HEADS, WIDTH = 4, 2, 32


def causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query >= key


def kept_bytes(attend: Any, precision: torch.dtype) -> tuple[int, int]:
    """What lives more after a forward pass, its result included, and then after its backward pass with gradients."""
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        for _ in range(2):  # what the first compiles lives on
            with MemoryTracker() as tracker:
                inputs = [(leaf * 1).transpose(1, 2) for leaf in leaves]
                before = tracker.live_bytes
                output = attend(*inputs)
                kept = tracker.live_bytes - before
                gradient = torch.ones_like(output)
                before = tracker.live_bytes
                gradients = torch.autograd.grad(output, inputs, gradient)
                del output
                grown = tracker.live_bytes - before
                del gradients, inputs
    return kept, grown


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_stand_in_keeps_what_torch_keeps(precision: torch.dtype) -> None:
    """By torch's own choice of what the backward pass needs, of a graph with all that a GPU's has."""
    mask = create_block_mask(causal, BATCH, None, LENGTH, LENGTH, device="cpu")
    with flex_on_cpu():
        compiled: Any = torch.compile(flex_attention, backend="aot_eager_decomp_partition")

        def theirs(*inputs: torch.Tensor) -> Any:
            return compiled(*inputs, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))[0]

        found = kept_bytes(theirs, precision)
    assert kept_bytes(flex.attend, precision) == found
    if precision is torch.float32:
        assert found[0] == 4 * BATCH * LENGTH * HEADS * (WIDTH + 1)


@pytest.mark.parametrize(("rows", "length"), [(1, 128), (3, 300), (2, 1024)])
def test_what_is_left_out_of_a_block_mask_is_small(rows: int, length: int) -> None:
    mask = create_block_mask(causal, rows, None, length, length, device="cpu")
    size = sum(tensor.nbytes for tensor in mask.as_tuple() if isinstance(tensor, torch.Tensor))
    blocks = -(-length // 128)
    assert size == 16 * rows * blocks * (blocks + 1)


def peak(heads: int = 4, **fields: Any) -> float:
    """In bytes, of one step; of sdpa unless another attention is named."""
    request = a_request(2, 1, 2, {"zero_stage": 3, "precision": "bf16", **fields})
    model = replace(request.model, config={**request.model.config, "num_attention_heads": heads})
    return predicted(replace(request, model=model), 1, 0)


CASES: list[dict[str, Any]] = [
    {},
    {"zero_stage": 0, "activation_checkpointing": "full"},
    {"engine": "deepspeed", "zero_stage": 2},
]


@pytest.mark.parametrize("fields", CASES)
def test_a_step_needs_what_sdpa_needs(fields: dict[str, Any]) -> None:
    assert peak(attention="flex_attention", **fields) == peak(**fields)
    assert transformers.masking_utils.create_block_mask is create_block_mask  # again


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_step_has_no_mask_of_all_pairs(batching: str) -> None:
    tokens = LENGTH if batching == "padded" else BATCH * LENGTH
    pairs = (BATCH if batching == "padded" else 1) * tokens**2
    assert peak(batching=batching) - peak(batching=batching, attention="flex_attention") >= pairs


def test_key_heads_are_copied_where_heads_are_no_power_of_two() -> None:
    config = TINY.config
    more = 6 - config["num_key_value_heads"]
    copied = 2 * BATCH * LENGTH * more * config["head_dim"] * 2 * config["num_hidden_layers"]
    assert peak(6, attention="flex_attention") == peak(6) + copied
