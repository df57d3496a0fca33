"""Operators counted on fake tensors, against what a model's sizes say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autotune.predict import counting
from autotune.predict.counting import count_operators
from autotune.predict.operators import Operators, Work, is_counted, operators, operators_name
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec, load_model

LENGTH = 32
DDP = TrialConfig(engine="pytorch", gpus=2, micro_batch_size=1, sequence_length=LENGTH, precision="fp32")


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    spec = load_model("qwen3-tiny", Path())
    return ModelSpec(name="short", config={**spec.config, "num_hidden_layers": 2})


def total(found: Operators, phase: str, *works: Work, batch: int = 3) -> float:
    rows = [row for row in found.rows if row.phase == phase and row.work in works]
    return sum(row.count * float(row.size(np.array([batch]))[0]) for row in rows)


def calls(found: Operators, phase: str) -> float:
    return sum(row.count for row in found.rows if row.phase == phase and row.work is Work.CALL)


def test_products_and_collectives_of_a_data_parallel_step(model: ModelSpec) -> None:
    found = count_operators(model, DDP)
    # Two FLOPs a weight and token forward, four backward; norms and the looked-up embedding have no products.
    embedding = model.vocab_size * model.hidden_size
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size + 2 * model.num_hidden_layers * model.head_dim
    outside = norms if model.config.get("tie_word_embeddings") else norms + embedding
    weights = model.num_parameters - outside
    flops = total(found, "micro_step", Work.PRODUCT)
    assert flops == pytest.approx(6 * weights * 3 * LENGTH, rel=0.01)  # and the rotary angles
    assert total(found, "micro_step", Work.ATTENTION_BACKWARD) == 2.5 * total(found, "micro_step", Work.ATTENTION)
    assert total(found, "micro_step", Work.ALL_REDUCE) == 0
    summed = total(found, "last_micro_step", Work.ALL_REDUCE)
    assert summed == pytest.approx(4 * model.num_parameters, rel=1e-3)  # and a map of which were used
    assert total(found, "update", Work.MOVED) > 7 * 4 * model.num_parameters


def test_checkpointing_runs_the_layers_again(model: ModelSpec) -> None:
    plain, again = (count_operators(model, replace(DDP, activation_checkpointing=kind)) for kind in ("none", "full"))
    assert total(again, "micro_step", Work.ATTENTION) == 2 * total(plain, "micro_step", Work.ATTENTION)
    assert calls(again, "micro_step") > calls(plain, "micro_step")


def test_sharded_layers_are_gathered_in_each_pass(model: ModelSpec) -> None:
    kept, again = (count_operators(model, replace(DDP, zero_stage=stage)) for stage in (2, 3))
    assert total(kept, "micro_step", Work.ALL_GATHER) < total(again, "micro_step", Work.ALL_GATHER)
    assert total(kept, "micro_step", Work.REDUCE_SCATTER) == 0
    assert total(kept, "last_micro_step", Work.REDUCE_SCATTER) == pytest.approx(4 * model.num_parameters, rel=0.01)
    assert any(row.work is Work.SHARDED_CALL for row in kept.rows)


def test_a_deep_model_is_a_line_through_two_depths(model: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = ModelSpec(name="deep", config={**model.config, "num_hidden_layers": 5})
    whole = count_operators(deep, DDP)
    monkeypatch.setattr(counting, "WHOLE_LAYERS", 1)
    line = count_operators(deep, DDP)
    for phase in ("micro_step", "last_micro_step"):
        assert calls(line, phase) == calls(whole, phase)
        for work in (Work.PRODUCT, Work.ATTENTION, Work.MOVED):
            assert total(line, phase, work) == pytest.approx(total(whole, phase, work), rel=1e-6)
    assert total(line, "last_micro_step", Work.ALL_REDUCE) == pytest.approx(4 * deep.num_parameters, rel=1e-3)
    assert total(line, "update", Work.MOVED) == pytest.approx(total(whole, "update", Work.MOVED), rel=0.01)


def test_operators_are_counted_once(model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = operators_name(model, DDP)
    assert name == operators_name(model, replace(DDP, micro_batch_size=8))
    assert name != operators_name(model, replace(DDP, sequence_length=2 * LENGTH))
    assert not is_counted(name)
    first = operators(name)
    assert is_counted(name)
    monkeypatch.setattr(counting, "count_operators", lambda *args: pytest.fail("counted again"))
    operators.cache_clear()
    assert operators(name) == first


def test_a_compiled_update_is_counted_as_one_that_is_not(model: ModelSpec) -> None:
    """It dispatches nothing; torchao, which compiles it, is not asked for."""
    assert count_operators(model, replace(DDP, optimizer="adamw_torch_8bit")) == count_operators(model, DDP)
