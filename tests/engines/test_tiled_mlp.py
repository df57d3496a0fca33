"""MLPs in pieces train like a plain loop on every engine, and nothing between their matrices is ever whole."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

from autotune.engines.engine import build_engine
from autotune.engines.tiled_mlp import in_tiles
from autotune.spec.config import MLP_TILES, LoraTargets
from autotune.spec.request import TrialRequest
from tests.engines import test_methods as methods
from tests.engines.parity import (
    CPU,
    SEQUENCE_LENGTH,
    Largest,
    Ranks,
    Trace,
    assert_equal,
    few,
    optimizer_steps,
    plain_training,
    request,
    tiny,
    train,
)
from tests.engines.test_layouts import auto_tensor, layout, slow

INTERMEDIATE = tiny().intermediate_size


@pytest.fixture(scope="module")
def reference() -> Trace:
    return plain_training(tiny())


def laid_out(engine: str, text: str, gpus: int, **fields: Any) -> TrialRequest:
    return request(engine, gpus=gpus, **{"tiled_mlp": True, **layout(text), **fields})


STAGES = [
    ("deepspeed", "zero0"),
    ("deepspeed", "zero1 full"),
    ("deepspeed", "zero2"),
    ("deepspeed", "zero2 full offload_optimizer"),
    ("deepspeed", "zero3 full mb4"),
    ("deepspeed", "zero3 selective"),
    ("deepspeed", "zero3 full offload"),
    ("pytorch", "zero0"),
    ("pytorch", "zero0 full"),
    ("pytorch", "zero2 mb1"),
    ("pytorch", "zero3 full mb4"),
    ("pytorch", "zero3 selective"),
    ("pytorch", "zero3 full offload chunked"),
]


@pytest.mark.parametrize(("engine", "text"), few(STAGES, [("deepspeed", "zero2"), ("pytorch", "zero3 full mb4")]))
def test_every_stage(ranks: Ranks, reference: Trace, engine: str, text: str) -> None:
    for trace in ranks.run(train, laid_out(engine, text, 2), build_engine):
        assert_equal(trace, reference)


@pytest.mark.parametrize(
    "text",
    [
        "sp2 zero0",
        *slow(
            "tp2", "tp2 selective", "tp2 full chunked", "sp2 zero3 full chunked", "pp2 1f1b", "pp2 1f1b full chunked"
        ),
        *slow("pp2 interleaved_1f1b selective", "pp2 zero_bubble mb1", "pp2 zero_bubble full"),
    ],
)
def test_layouts(ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in ranks.run(train, laid_out("pytorch", text, 2), build_engine):
        assert_equal(trace, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        *("zero3 groups2 full", "tp2 zero3 full chunked", "tp2 sp2 zero3 full", "pp2 1f1b tp2 full"),
        *("pp2 1f1b zero3 mb1 full", "pp2 1f1b sp2 zero3", "pp2 zero_bubble zero2 mb1", "pp4 1f1b mb1"),
    ],
)
def test_layouts_on_four_ranks(four_ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in four_ranks.run(train, laid_out("pytorch", text, 4), build_engine):
        assert_equal(trace, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["sp2 zero3 full", "sp2 zero3", "sp2 zero3 selective mb1", "tp2 zero1", "tp2 zero2 full", "tp2 zero3 full"]
)
def test_deepspeed_shares_sequences_or_matrices(ranks: Ranks, reference: Trace, text: str) -> None:
    """The first is ALST."""
    for trace in ranks.run(auto_tensor, laid_out("deepspeed", text, 2)):
        assert_equal(trace, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["sp2 zero3 mb1", "sp4 zero3 full", "sp2 zero3 full offload", "tp2 zero2 full offload_optimizer", "tp2 zero3"],
)
def test_deepspeed_on_four_ranks(four_ranks: Ranks, reference: Trace, text: str) -> None:
    for trace in four_ranks.run(auto_tensor, laid_out("deepspeed", text, 4)):
        assert_equal(trace, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "text"),
    [
        *(("deepspeed", text) for text in ("zero0", "zero1", "zero2 full", "zero3 full")),
        *(("pytorch", text) for text in ("zero0", "zero3 full", "tp2 full", "sp2 zero3 full")),
    ],
)
def test_bf16(ranks: Ranks, reference: Trace, engine: str, text: str) -> None:
    """Within the tolerances of `test_parity.py`."""
    loss_rtol, norm_rtol = (1e-2, 0.1) if (engine, text) == ("deepspeed", "zero0") else (1e-3, 2e-2)
    for trace in ranks.run(train, laid_out(engine, text, 2, precision="bf16"), build_engine):
        assert_equal(trace, reference, loss_rtol=loss_rtol, norm_rtol=norm_rtol)


LORA = [
    ("deepspeed", "zero2", "all-linear"),
    ("deepspeed", "zero3 full", "all-linear"),
    ("deepspeed", "zero0 full", "mlp"),
    ("deepspeed", "zero2 selective", "mlp"),
    ("deepspeed", "zero3 full", "mlp"),
    ("deepspeed", "zero3", "attention"),
    ("deepspeed", "sp2 zero3", "all-linear"),
    ("pytorch", "zero0", "all-linear"),
    ("pytorch", "zero0", "mlp"),
    ("pytorch", "zero3 full", "attention"),
    ("pytorch", "tp2", "all-linear"),
    ("pytorch", "tp2 full", "all-linear"),
    ("pytorch", "sp2 zero3 full", "all-linear"),
]


@pytest.mark.parametrize(("engine", "text", "targets"), few(LORA, [("pytorch", "zero0", "all-linear")]))
def test_lora(ranks: Ranks, engine: str, text: str, targets: LoraTargets) -> None:
    fields = layout(text)
    trial = methods.request(engine, fields.pop("zero_stage"), tiled_mlp=True, lora_target_modules=targets, **fields)
    for trace in ranks.run(auto_tensor, trial):
        assert_equal(trace, methods.plain_training(targets))


@pytest.mark.slow
def test_adapters_behind_nothing_that_trains_get_no_gradient_from_deepspeed(ranks: Ranks) -> None:
    """When this fails, `autotune.space.tiled_mlp` refuses too much."""
    trial = methods.request("deepspeed", 2, tiled_mlp=True, lora_target_modules="mlp")
    with pytest.raises(AssertionError, match="loss must be a scalar tensor"):
        ranks.run(train, trial, build_engine)


# ---- memory


def is_between_the_matrices(tensor: torch.Tensor) -> bool:
    """Whether it is (batch, tokens, width) of an MLP."""
    return tensor.dim() == 3 and tensor.shape[2] == INTERMEDIATE


def widest(rank: int, trial: TrialRequest) -> int:
    """Tokens of the longest such tensor."""
    engine, seen = build_engine(trial, CPU), Largest(is_between_the_matrices)
    with seen:
        optimizer_steps(rank, trial, engine)
    return seen.elements // INTERMEDIATE


@pytest.mark.parametrize(
    ("engine", "text"),
    few([("pytorch", "zero2 full"), ("pytorch", "zero0"), ("deepspeed", "zero2")], [("deepspeed", "zero2")]),
)
@pytest.mark.parametrize("tiled", [False, True])
def test_what_is_between_the_matrices_is_of_one_piece(ranks: Ranks, engine: str, text: str, tiled: bool) -> None:
    trial = laid_out(engine, f"{text} mb2", 2, tiled_mlp=tiled)
    tokens = 2 * SEQUENCE_LENGTH
    assert ranks.run(widest, trial) == [tokens // MLP_TILES if tiled else tokens] * 2


# ---- how DeepSpeed counts pieces


def ready(tokens: int, tiles: int | None = None) -> bool:
    """Whether DeepSpeed says of a weight, at the end of a backward pass, that its gradient may be reduced."""
    mlp = torch.nn.Linear(4, 4)
    hidden = torch.ones(1, tokens, 4, requires_grad=True)
    if tiles is None:
        tiled = in_tiles(mlp, mlp.forward, hidden)
    else:
        tiled = TiledMLP.apply(lambda mlp, piece: mlp(piece), mlp, hidden, tiles, [mlp.weight])
    tiled.sum().backward()  # type: ignore[no-untyped-call]  # torch has not annotated it
    return bool(vars(mlp.weight)["ds_grad_is_ready"])


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 49, 50, 57, 4096])
def test_the_last_piece_is_the_one_that_deepspeed_waits_for(tokens: int) -> None:
    assert ready(tokens)


def test_of_fewer_pieces_than_it_asks_for_deepspeed_reduces_nothing() -> None:
    """When this fails, `autotune.engines.tiled_mlp` need not count."""
    assert not ready(9, tiles=8)
