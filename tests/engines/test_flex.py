"""FlexAttention trains like a plain loop on every engine and stage, by its dense arithmetic (`flex_on_cpu`).

That the kernels of GPUs are right is not shown here. What is shown is what is around them: that transformers' block
masks hide what they have to, that gradients come back, and that torch compiles wherever engines call it.
"""

from typing import Any

import pytest
import torch
from transformers.integrations.flex_attention import flex_attention_forward

from autotune.engines.batches import MicroBatch, collated, sequence
from autotune.engines.engine import build_engine
from autotune.engines.pytorch import PyTorchEngine
from autotune.modeling.build import build_model, materialize
from autotune.spec.config import Attention, Batching
from autotune.spec.model import ModelSpec
from autotune.spec.request import TrialRequest
from tests.engines.flex_on_cpu import flex_on_cpu
from tests.engines.parity import (
    CPU,
    SMALL_BUCKETS,
    VOCAB,
    WORKLOAD,
    Ranks,
    Trace,
    assert_equal,
    plain_training,
    request,
    tiny,
    train,
)
from tests.engines.test_batching import BATCHINGS, SEQUENCES, loss_and_gradients, trial


def test_without_a_mask_it_sees_later_tokens() -> None:
    """Which is why it is refused where layers are given none (`autotune.space.attention`)."""
    query, key, value = torch.randn(3, 1, 2, 4, 16, generator=torch.Generator().manual_seed(1))
    module: Any = torch.nn.Module().eval()
    with flex_on_cpu(), torch.no_grad():
        first = flex_attention_forward(module, query, key, value, None)[0][:, 0]
    torch.testing.assert_close(first, torch.nn.functional.scaled_dot_product_attention(query, key, value)[:, :, 0])
    assert not torch.allclose(first, value[:, :, 0])  # all that a first token may see


ATTENTIONS: tuple[Attention, ...] = ("sdpa", "flex_attention")


def trained(rank: int, trial: TrialRequest) -> Trace:
    with flex_on_cpu():
        return train(rank, trial, build_engine)


SIX_HEADS = {"model_type": "qwen2", "num_attention_heads": 6, "hidden_size": 96}
"""No power of two, like the 40 of Qwen2.5-32B: transformers copies key heads then."""

CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("pytorch", 3, {}, {}),
    ("pytorch", 0, {"model_type": "llama"}, {"activation_checkpointing": "selective", "selective_every": 2}),
    ("pytorch", 2, SIX_HEADS, {"activation_checkpointing": "full", "precision": "bf16"}),
    ("pytorch", 0, {}, {"precision": "bf16"}),
    ("deepspeed", 2, {}, {"activation_checkpointing": "full", "deepspeed": dict(SMALL_BUCKETS)}),
    ("deepspeed", 3, {}, {"precision": "bf16", "deepspeed": dict(SMALL_BUCKETS)}),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("engine", "stage", "changes", "fields"), CASES)
def test_every_stage(ranks: Ranks, engine: str, stage: int, changes: dict[str, Any], fields: dict[str, Any]) -> None:
    model = ModelSpec(name="tiny", config={**tiny().config, **changes})
    loss_rtol, norm_rtol = (1e-3, 2e-2) if fields.get("precision") == "bf16" else (1e-4, 1e-4)
    found = request(engine, stage, model=model, attention="flex_attention", **fields)
    for trace in ranks.run(trained, found, seconds=500):
        assert_equal(trace, plain_training(model), loss_rtol=loss_rtol, norm_rtol=norm_rtol)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_lengths_are_not_each_compiled_anew(batching: Batching) -> None:
    """torch gives up after eight compilations, and then makes every score: so it does with `dynamic_padding`."""
    fields = {"attention": "flex_attention", "batching": batching}
    with flex_on_cpu():
        engine = PyTorchEngine(trial(**fields), CPU)
        for step in range(10):
            lengths = [3 + step, 16 + 13 * step, 130 + step]
            sequences = [torch.from_numpy(sequence(3, step, at, length, VOCAB)) for at, length in enumerate(lengths)]
            batch = collated(sequences, batching, 260)
            loss_and_gradients(engine, batch)
            engine.evaluate(batch.input_ids, **batch.more)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batching", ["fixed", *BATCHINGS])
def test_what_torch_compiles_on_cpus_without_gradients_agrees(batching: Batching) -> None:
    """Block masks and kernels as torch's inductor makes them."""
    batch = MicroBatch(SEQUENCES[1].repeat(2, 1), 32, {"labels": SEQUENCES[1].repeat(2, 1)})
    if batching != "fixed":
        batch = collated(SEQUENCES, batching, 16)
    losses = []
    for attention in ATTENTIONS:
        model = build_model(tiny(), attention)
        materialize(model, CPU, torch.float32, WORKLOAD.seed)
        with torch.no_grad():
            losses.append(model(batch.input_ids, **batch.more, use_cache=False).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
