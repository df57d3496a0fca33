"""`torch_compile`: searched where it is stated, refused with what it does not go with, dropped without a compiler."""

from pathlib import Path
from typing import Any

import pytest

from autotune.formats.targets import cannot_express
from autotune.predict.memory import deviation, structures
from autotune.space.compilation import COMPILATION_RULES
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from tests.samples import sample_space

SEARCH: dict[str, Any] = {"engine": ["deepspeed", "pytorch"], "zero_stage": [0, 3], "torch_compile": [False, True]}
NODE = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
PLAIN = {"engine": "pytorch", "zero_stage": 3, "gpus": 8, "micro_batch_size": 1, "sequence_length": 4096}


def test_layers_are_compiled_where_it_is_searched(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=SEARCH, baseline=...)
    found = [config for config in space.candidates if config.torch_compile]
    assert {(config.engine, config.zero_stage) for config in found} == {("pytorch", 0), ("pytorch", 3)}
    assert not space.dropped
    assert space.numerics == ()
    for config in found:
        assert TrialConfig.from_dict(config.to_dict()) == config in space
        assert config.describe().endswith("compiled")
    assert {config.torch_compile for config in sample_space(tmp_path).candidates} == {False}


def test_it_is_dropped_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    space = sample_space(tmp_path, search=SEARCH, baseline=...)
    (dropped,) = space.dropped
    assert (dropped.axis, dropped.value) == ("torch_compile", True)
    assert "needs a C++ compiler on CPUs, and no-such-compiler is not on the PATH" in dropped.reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"activation_checkpointing": "full", "method": "lora"}, None),
        ({"engine": "deepspeed"}, "is run by engine pytorch alone"),
        ({"tensor_parallel_size": 2}, "does not go with tensor_parallel_size 2"),
        ({"loss": "chunked"}, "does not go with loss chunked"),
        ({"zero_stage": 0, "method": "qlora"}, "cannot look into what bitsandbytes does"),
        ({"activation_checkpointing": "selective_ops"}, "with it torch_compile compiles nothing"),
        ({"batching": "packed"}, "would compile each length anew"),
        ({"batching": "padded"}, None),
    ],
)
def test_what_it_goes_with(fields: dict[str, Any], reason: str | None) -> None:
    model, work = load_model("Qwen/Qwen3-32B", Path()), Workload(global_batch_size=64)
    config = TrialConfig.from_dict({**PLAIN, "torch_compile": True, **fields})
    found = [said for rule in COMPILATION_RULES if (said := rule(config, work, model, NODE)) is not None]
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]
    plain = TrialConfig.from_dict({**PLAIN, **fields})
    assert [rule(plain, work, model, NODE) for rule in COMPILATION_RULES] == [None] * len(COMPILATION_RULES)


def test_who_runs_it() -> None:
    config = TrialConfig.from_dict({**PLAIN, "torch_compile": True})
    assert cannot_express("accelerate", config, "cuda") is None
    assert cannot_express("autotune", config, "cuda") is None
    assert "compile the model in one piece" in (cannot_express("hf_trainer", config, "cuda") or "")


def test_it_is_traced_and_on_gpus_predicted_less_surely(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search={"engine": "pytorch", "zero_stage": 0, "torch_compile": [False, True]})
    without, compiled = (
        next(config for config in space.candidates if config.torch_compile == value) for value in (False, True)
    )
    assert structures(space.model, without, accumulates=True) != structures(space.model, compiled, accumulates=True)
    assert deviation(space.cluster, compiled=True) == deviation(space.cluster)
    assert deviation(NODE, compiled=True) > 0.1 > deviation(NODE)
