"""Every layout trains like a plain loop, see `test_parity.py`; and a plan that forgets a module is found out."""

import itertools
from typing import Any

import deepspeed.utils.groups
import pytest
import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import SequenceParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autotune.engines import pipeline
from autotune.engines.engine import build_engine
from autotune.engines.layout import LayoutEngine
from autotune.engines.pipeline import PipelineEngine
from autotune.modeling import tensor_parallel
from autotune.spec.config import REDUCE_SCATTER
from autotune.spec.model import ModelSpec
from autotune.spec.request import TrialRequest
from tests.engines.parity import (
    CPU,
    SMALL_BUCKETS,
    VOCAB,
    Largest,
    Ranks,
    Trace,
    assert_equal,
    optimizer_steps,
    plain_training,
    request,
    tiny,
    train,
)

HIDDEN = tiny().hidden_size
SHORT = {
    "tp": "tensor_parallel_size",
    "sp": "sequence_parallel_size",
    "pp": "pipeline_parallel_size",
    "zero": "zero_stage",
    "groups": "data_parallel_replicate_size",
    "mb": "micro_batch_size",
    "schedule": "pipeline_schedule",
    "ckpt": "activation_checkpointing",
}


def layout(text: str) -> dict[str, Any]:
    """The fields of a config from words such as `tp2 zero3 chunked`."""
    fields: dict[str, Any] = {"zero_stage": 0}
    for word in text.split():
        if word == "chunked":
            fields["loss"] = "chunked"
        elif word in ("1f1b", "interleaved_1f1b", "zero_bubble"):
            fields["pipeline_schedule"] = word
        elif word == "offload_optimizer":
            fields["offload"] = "optimizer"
        elif word == "offload":
            fields["offload"] = "optimizer+parameters"
        elif word in ("full", "selective", "selective_ops"):
            fields["activation_checkpointing"] = word
            fields["selective_every"] = 2 if word == "selective" else None
        else:
            name = word.rstrip("0123456789")
            fields[SHORT[name]] = int(word[len(name) :])
    return fields


def trial(text: str, gpus: int, model: ModelSpec | None = None, engine: str = "pytorch", **fields: Any) -> TrialRequest:
    return request(engine, model=model, gpus=gpus, **{**layout(text), **fields})


@pytest.fixture(scope="module")
def reference() -> Trace:
    return plain_training(tiny())


def slow(*texts: str) -> list[Any]:
    return [pytest.param(text, marks=pytest.mark.slow) for text in texts]


@pytest.mark.parametrize(
    "text",
    [
        "zero3 chunked offload",
        "tp2 chunked selective_ops",
        "sp2 zero3",
        "pp2 1f1b full",
        "pp2 zero_bubble mb1",
        *slow(
            "zero0 chunked",
            "zero3 chunked",
            "tp2 chunked full",
            "sp2 zero2 selective_ops",
            "pp2 1f1b selective_ops",
            "zero2 chunked selective",
            "tp2",
            "tp2 selective",
            "sp2 zero0",
            "sp2 zero2 full chunked",
            "pp2 1f1b",
            "pp2 1f1b mb1 chunked",
            "pp2 interleaved_1f1b selective",
            "pp2 interleaved_1f1b mb1",
            "pp2 zero_bubble full",
        ),
    ],
)
def test_two_ranks(ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in ranks.run(train, trial(text, 2), build_engine):
        assert_equal(trace, reference)


def auto_tensor(rank: int, trial: TrialRequest) -> Trace:
    """DeepSpeed keeps its groups and its attention as long as a process lives; those of the next case are others."""
    try:
        return train(rank, trial, build_engine)
    finally:
        deepspeed.utils.groups._release_process_group_references(None)
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop(trial.config.attention, None)


@pytest.mark.parametrize(
    "text",
    [
        "tp2 zero2 full",
        "sp2 zero3 full",
        *slow("tp2 zero1", "tp2 zero1 mb1 selective", "tp2 zero2 mb8", "tp2 zero3", "tp2 zero2 offload_optimizer"),
        *slow("sp2 zero3", "sp2 zero3 selective mb1", "sp2 zero3 selective_ops mb8", "sp2 zero3 offload_optimizer"),
    ],
)
def test_deepspeed_on_two_ranks(ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in ranks.run(auto_tensor, trial(text, 2, engine="deepspeed")):
        assert_equal(trace, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        *("tp2 zero1", "tp2 zero2 full offload_optimizer", "tp2 zero3 offload"),
        *("sp2 zero3 mb1", "sp2 zero3 full offload", "sp4 zero3", "sp4 zero3 selective"),
    ],
)
def test_deepspeed_on_four_ranks(four_ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in four_ranks.run(auto_tensor, trial(text, 4, engine="deepspeed")):
        assert_equal(trace, reference)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tp2 zero2", "sp2 zero3"])
@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", False), ("llama", True), ("qwen3", True)])
def test_families_of_deepspeed(ranks: Ranks, model_type: str, tied: bool, text: str) -> None:
    model = ModelSpec(name=model_type, config={**tiny(tied).config, "model_type": model_type})
    for trace in ranks.run(auto_tensor, trial(text, 2, model, engine="deepspeed")):
        assert_equal(trace, plain_training(model))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tp2 zero2", "sp2 zero3"])
def test_deepspeed_in_bf16(ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in ranks.run(auto_tensor, trial(text, 2, engine="deepspeed", precision="bf16")):
        assert_equal(trace, reference, loss_rtol=1e-3, norm_rtol=2e-2)


@pytest.mark.slow
def test_what_is_refused_of_deepspeed_trains_wrong(ranks: Ranks, reference: Trace) -> None:
    """When this fails, `autotune.space.layouts` refuses too much."""
    for trace in ranks.run(auto_tensor, trial("tp2 zero2 selective_ops", 2, engine="deepspeed")):
        with pytest.raises(AssertionError):
            assert_equal(trace, reference, loss_rtol=2e-4, norm_rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "keys"), [("sp2 zero0", {}), ("sp2 zero1", {}), ("sp2 zero2", {}), ("sp2 zero3", {REDUCE_SCATTER: False})]
)
def test_shared_sequences_below_zero_3_have_gradients_as_many_times_too_large(
    ranks: Ranks, reference: Trace, text: str, keys: dict[str, Any]
) -> None:
    """As under the Trainer, whose loss it is. When this fails, `autotune.space.layouts` refuses too much."""
    keys = {**dict(SMALL_BUCKETS), **keys}
    for trace in ranks.run(auto_tensor, trial(text, 2, engine="deepspeed", deepspeed=keys)):
        assert trace.norms[0] == pytest.approx(2 * reference.norms[0], rel=1e-4)


@pytest.mark.slow
def test_deepspeed_takes_the_same_neighbours_for_matrices_and_sequences(four_ranks: Ranks) -> None:
    """When this fails, `autotune.space.layouts` refuses too much."""
    with pytest.raises(AssertionError, match="Data inconsistency within the TP group"):
        four_ranks.run(auto_tensor, trial("tp2 sp2 zero3", 4, engine="deepspeed"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "zero3 groups2",
        "zero2 groups2 full offload",
        "zero3 groups2 chunked mb1",
        "tp2 zero3 offload",
        "pp2 1f1b zero3 offload",
        "tp2 sp2 zero3",
        "pp2 1f1b tp2 full",
        "tp2 zero2 chunked",
        "tp2 zero3 full",
        "tp2 zero3 selective mb1",
        "sp2 zero0 full",
        "sp2 zero3 chunked",
        "sp4 zero0",
        "sp4 zero3 full",
        "tp2 sp2 zero2 full chunked",
        "pp2 1f1b tp2 chunked",
        "pp2 zero_bubble tp2",
        "pp2 interleaved_1f1b tp2 full",
        "pp2 1f1b zero0",
        "pp2 1f1b zero2 full",
        "pp2 1f1b zero3 mb1",
        "pp2 interleaved_1f1b zero0 mb1",
        "pp2 interleaved_1f1b zero3 mb1 full",
        "pp2 zero_bubble zero2 mb1",
        "pp2 1f1b sp2 zero0",
        "pp2 1f1b sp2 zero3 full",
        "pp2 zero_bubble sp2 zero2 full",
        "pp4 1f1b mb1",
        "pp4 1f1b mb2 full chunked",
    ],
)
def test_four_ranks(four_ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in four_ranks.run(train, trial(text, 4), build_engine):
        assert_equal(trace, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "groups2 tp2 zero3",
        "groups2 sp2 zero2 full chunked",
        "groups2 pp2 1f1b zero3 mb1 selective_ops",
        "groups2 pp2 zero_bubble zero2 mb1",
        "tp2 sp2 zero3",
        "tp2 sp2 zero2 full chunked",
        "pp2 1f1b tp2 sp2 zero3",
        "pp2 1f1b tp2 sp2 zero2 full chunked",
        "pp2 interleaved_1f1b tp2 sp2 zero3",
        "pp2 zero_bubble tp2 sp2 zero2",
        "pp2 1f1b tp2 zero3 mb1 full",
        "pp2 1f1b sp2 zero3 mb1",
        "pp4 1f1b tp2 mb1",
    ],
)
def test_eight_ranks(eight_ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in eight_ranks.run(train, trial(text, 8), build_engine):
        assert_equal(trace, reference)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tp2", "sp2 zero3 full", "tp2 chunked", "zero3 chunked"])
def test_tied_embeddings(ranks: Ranks, text: str) -> None:
    for trace in ranks.run(train, trial(text, 2, tiny(tied=True)), build_engine):
        assert_equal(trace, plain_training(tiny(tied=True)))


def family(model_type: str) -> ModelSpec:
    spec = tiny()
    return ModelSpec(name=f"tiny-{model_type}", config={**spec.config, "model_type": model_type})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "text"), [*itertools.product(["qwen2", "llama"], ["tp2", "sp2 zero3", "pp2 1f1b"])]
)
def test_families(ranks: Ranks, model_type: str, text: str) -> None:
    for trace in ranks.run(train, trial(text, 2, family(model_type)), build_engine):
        assert_equal(trace, plain_training(family(model_type)))


@pytest.mark.parametrize(
    "text",
    ["tp2", *slow("tp2 chunked full", "sp2 zero0", "sp2 zero3", "pp2 1f1b", "pp2 zero_bubble full", "zero3 chunked")],
)
def test_bf16(ranks: Ranks, reference: Trace, text: str) -> None:
    """Within what eight bits of mantissa allow: 1e-3 of the loss, 2 % of the norm."""
    for trace in ranks.run(train, trial(text, 2, precision="bf16"), build_engine):
        assert_equal(trace, reference, loss_rtol=1e-3, norm_rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tp2 zero3", "pp2 1f1b zero3", "tp2 sp2 zero3 chunked"])
def test_bf16_on_four_ranks(four_ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in four_ranks.run(train, trial(text, 4, precision="bf16"), build_engine):
        assert_equal(trace, reference, loss_rtol=1e-3, norm_rtol=2e-2)


# ---- the test of the test


class ForgetfulPlan(LayoutEngine):
    """Tensor parallelism that takes the heads under the norms of queries and keys for all heads.

    Nothing fails and the first loss is right, but no rank learns what the others' heads say of these weights.
    """

    def _lay_out(self, request: TrialRequest, device: torch.device) -> torch.nn.Module:
        whole, alone = tensor_parallel.layer_plan, SequenceParallel(use_local_output=True)
        alone.sequence_sharding = (Replicate(),)  # type: ignore[assignment]
        wrong = {"self_attn.q_norm": alone, "self_attn.k_norm": alone}
        tensor_parallel.layer_plan = lambda layer: whole(layer) | wrong
        try:
            return super()._lay_out(request, device)
        finally:
            tensor_parallel.layer_plan = whole


class UnsummedPieces(LayoutEngine):
    """Sequence parallelism that takes every piece for the first: positions are wrong."""

    def _piece(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.chunk(self._mesh.sequence.size(), dim=1)[0].contiguous()


@pytest.mark.parametrize(("wrong", "text"), [(ForgetfulPlan, "tp2"), (UnsummedPieces, "sp2")])
def test_a_wrong_layout_is_found(ranks: Ranks, reference: Trace, wrong: type[LayoutEngine], text: str) -> None:
    trace = ranks.run(train, trial(text, 2), wrong)[0]
    with pytest.raises(AssertionError):
        assert_equal(trace, reference)


class Misannounced(PipelineEngine):
    """Stages send fp32, and the next receives bf16."""

    def _lay_out(self, request: TrialRequest, device: torch.device) -> torch.nn.Module:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline._Shapes, "hidden", lambda shapes: hidden(shapes).to(torch.bfloat16))
            return super()._lay_out(request, device)


hidden = pipeline._Shapes.hidden


def test_stages_are_held_to_what_they_announce(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"a stage sends \(4, 16, 64\) of torch.float32, and announced"):
        ranks.run(train, trial("pp2 1f1b", 2, micro_batch_size=4), Misannounced)


# ---- memory


def is_logits(tensor: torch.Tensor) -> bool:
    """Whether it is as wide as the vocabulary, and no transposed weight."""
    return tensor.shape[-1:] == (VOCAB,) and tensor.shape != (HIDDEN, VOCAB)


def largest_logits(rank: int, trial: TrialRequest) -> int:
    engine, logits = build_engine(trial, CPU), Largest(is_logits)
    with logits:
        optimizer_steps(rank, trial, engine)
    return logits.elements


@pytest.mark.parametrize(
    ("text", "tokens"), [("sp2 zero0", 4 * 8), ("sp2 zero0 chunked", 4 * 1), ("tp2", 0), ("zero2 chunked", 4 * 2)]
)
def test_how_many_whole_logits_live(ranks: Ranks, text: str, tokens: int) -> None:
    """Of micro-batches of 4 x 16 tokens: all, an eighth, or none where each rank has a share of the vocabulary."""
    assert ranks.run(largest_logits, trial(text, 2, micro_batch_size=4)) == [tokens * VOCAB] * 2
