"""`method` and LoRA's axes: stated once, searched only when asked for, refused where they cannot be."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import InvalidSpaceError
from autotune.space.space import load_space
from autotune.spec.config import TrialConfig
from tests.samples import SPACE, sample_space, space_text

SEARCH = SPACE["search"]


def searching(**numerics: Any) -> dict[str, Any]:
    return {**SEARCH, "numerics": numerics}


def test_a_study_trains_all_weights_unless_told(tmp_path: Path) -> None:
    space = sample_space(tmp_path)
    assert {config.method for config in space.candidates} == {"full"}
    assert all(config.lora_rank is None and config.lora_alpha is None for config in space.candidates)
    assert "method" not in space.candidates[0].to_dict()


def test_ranks_are_searched_where_numerics_says_so(tmp_path: Path) -> None:
    numerics = {"method": ["full", "lora"], "lora_rank": [4, 8], "lora_target_modules": ["all-linear", "attention"]}
    space = sample_space(tmp_path, search=searching(**numerics), lora={"alpha": 16}, targets=["hf_trainer"])
    adapted = [config for config in space.candidates if config.method == "lora"]
    whole = [config for config in space.candidates if config.method == "full"]
    assert len(adapted) == 4 * len(whole) > 0
    assert space.numerics == ("method", "lora_rank", "lora_target_modules")
    assert {config.lora_rank for config in adapted} == {4, 8}
    assert {config.lora_alpha for config in adapted} == {16}
    assert not space.dropped
    for config in adapted:
        assert config in space
        assert TrialConfig.from_dict(config.to_dict()) == config


def test_a_fixed_method_is_stated_at_the_top(tmp_path: Path) -> None:
    space = sample_space(tmp_path, method="lora", lora={"rank": 8, "target_modules": "mlp"})
    found = {(c.method, c.lora_rank, c.lora_alpha, c.lora_target_modules) for c in space.candidates}
    assert found == {("lora", 8, 32, "mlp")}
    assert not space.numerics
    assert space.candidates[0].describe().startswith("lora r8 mlp ")
    assert space.baseline is not None
    assert space.baseline.method == "lora"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "lora", "search": searching(method=["full", "lora"])}, "method: is stated here and under"),
        (
            {"method": "lora", "lora": {"rank": 8}, "search": searching(lora_rank=[4])},
            "lora.rank: is stated here and as search.numerics.lora_rank",
        ),
        ({"lora": {"rank": 8}}, "lora.rank: means nothing to method full"),
        ({"search": searching(lora_rank=[4, 8])}, "search.numerics.lora_rank: means nothing to method full"),
        (
            {"method": "lora", "lora": {"dropout": 0.1}},
            "lora.dropout: is not a key of a search space; allowed here: rank",
        ),
        ({"search": searching(lora_alpha=[4, 8])}, "search.numerics.lora_alpha: is not a key of a search space"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (tmp_path / "space.yaml").write_text(space_text(**changes))
    with pytest.raises(InvalidSpaceError, match=r"space\.yaml: ") as caught:
        load_space(tmp_path / "space.yaml")
    assert reason in str(caught.value)


def test_qlora_is_dropped_where_its_library_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    space = sample_space(tmp_path, search=searching(method=["lora", "qlora"]), baseline=...)
    assert {config.method for config in space.candidates} == {"lora"}
    (dropped,) = space.dropped
    assert (dropped.axis, dropped.value) == ("method", "qlora")
    assert "pip install 'autotune-llm[qlora]'" in dropped.reason


@pytest.mark.parametrize(
    ("numerics", "search", "reason"),
    [
        ({"lora_rank": [8, 4096]}, {}, "lora_rank 4096 is more than that of k_proj, 64 x 128"),
        (
            {"lora_rank": [3, 4]},
            {"engine": "pytorch", "tensor_parallel_size": [1, 2], "zero_stage": 0},
            "tensor_parallel_size 2 does not divide lora_rank 3",
        ),
        ({"method": ["full", "qlora"]}, {"zero_stage": [0, 3]}, "zero_stage 3 on engine deepspeed shards weights"),
        ({"method": ["full", "qlora"]}, {"engine": "pytorch", "zero_stage": [0, 2]}, "zero_stage 2 on engine pytorch"),
    ],
)
def test_what_cannot_run_is_refused(
    tmp_path: Path, numerics: dict[str, Any], search: dict[str, Any], reason: str
) -> None:
    numerics = {"method": "lora", **numerics}
    space = sample_space(tmp_path, search={**searching(**numerics), **search}, baseline=...)
    assert space.candidates
    assert any(reason in found for found in space.illegal), list(space.illegal)
