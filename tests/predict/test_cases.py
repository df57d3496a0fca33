"""Cases: one answer a line, whatever the lines are."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import UsageError
from autotune.predict.cases import answer, answers, read_cases
from autotune.units import GIB

GENERATE: dict[str, Any] = {
    "id": "g",
    "model": "Qwen/Qwen3-8B",
    "cluster": {"gpu": "H100-80GB"},
    "task": "generate",
    "config": {"batch_size": 1, "prompt_tokens": 128, "new_tokens": 128},
}
TRAIN: dict[str, Any] = {
    "id": "t",
    "model": "Qwen/Qwen3-8B",
    "cluster": {"gpu": "H100-80GB", "nodes": 2, "gpus_per_node": 8},
    "workload": {"sequence_length": 4096, "global_batch_size": 128},
    "implementation": "nanotron",
    "config": {"tensor_parallel_size": 4, "zero_stage": 1, "micro_batch_size": 1},
}
KEYS = {
    "id", "fits", "fit_probability", "peak_memory_bytes", "peak_memory_kind", "breakdown", "step_time_seconds",
    "tokens_per_second_per_gpu", "model_flops_utilization",
}  # fmt: skip


def changed(case: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The case with one key set, or taken out with `...`."""
    case = copy.deepcopy(case)
    *parents, last = path.split(".")
    inner = case
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return case


@pytest.mark.parametrize("case", [GENERATE, TRAIN], ids=["generate", "train"])
def test_an_answer_has_the_promised_keys_and_parts_that_add_up(case: dict[str, Any]) -> None:
    found = answer(case)
    assert found.keys() >= KEYS
    assert sum(found["breakdown"].values()) == found["peak_memory_bytes"]
    assert found["fits"] is True
    assert found["fit_probability"] > 0.5


def test_together_cases_are_answered_as_each_alone() -> None:
    dense = changed(TRAIN, "implementation", ...) | {
        "model": "qwen3-tiny",
        "cluster": {"gpu": "H100-80GB", "gpus_per_node": 2},
        "workload": {"sequence_length": 128, "global_batch_size": 64},
    }
    cases = [
        dense | {"id": n, "config": {"engine": "pytorch", "zero_stage": 0, "micro_batch_size": size, "precision": kind}}
        for n, (size, kind) in enumerate([(1, "bf16"), (2, "bf16"), (3, "bf16"), (4, "fp32")])
    ]
    cases += [TRAIN, GENERATE, changed(GENERATE, "config.batch_size", "many")]
    found = answers(cases)
    assert [document["id"] for document in found] == [0, 1, 2, 3, "t", "g", "g"]
    assert ["error" in document for document in found] == [False, False, True, False, False, False, True]
    assert found == [answer(case) for case in cases]
    assert found[0]["step_time_seconds"] != found[1]["step_time_seconds"]


def test_what_does_not_fit_is_said() -> None:
    found = answer(changed(TRAIN, "config.micro_batch_size", 32))
    assert found["fits"] is False
    assert found["fit_probability"] < 0.5


def test_a_config_dict_is_the_same_as_its_name(tmp_path: Path) -> None:
    from autotune.spec.model import load_model

    config = load_model("Qwen/Qwen3-8B", tmp_path).config
    assert answer(changed(GENERATE, "model", config)) == answer(GENERATE)


@pytest.mark.parametrize(
    ("case", "path", "value", "words"),
    [
        (GENERATE, "model", "Qwen/Qwen9", ("Qwen/Qwen9", "Qwen/Qwen3-8B")),
        (GENERATE, "model", {"model_type": "gpt9"}, ("gpt9", "qwen3")),
        (GENERATE, "model", 3, ("model", "3")),
        (GENERATE, "cluster.gpu", "Z9", ("Z9", "H100-80GB")),
        (GENERATE, "config.prompt_tokens", ..., ("config.prompt_tokens", "missing")),
        (GENERATE, "config.prompt_tokens", 0, ("config.prompt_tokens", "0")),
        (GENERATE, "config.quantization", "int3", ("config.quantization", "int3", "nf4")),
        (GENERATE, "config.speed", 1, ("config.speed",)),
        (GENERATE, "color", "red", ("color",)),
        (GENERATE, "implementation", "vllm", ("vllm", "transformers-4.37")),
        (GENERATE, "workload", {"sequence_length": 1}, ("workload", "generate")),
        (GENERATE, "id", ..., ("id", "missing")),
        (TRAIN, "workload", ..., ("workload", "missing")),
        (TRAIN, "workload.global_batch_size", 3, ("global_batch_size 3", "4")),
        (TRAIN, "config.tensor_parallel_size", 3, ("tensor_parallel_size 3", "16 GPUs")),
        (TRAIN, "config.data_parallel_size", 2, ("data_parallel_size 2", "16 GPUs")),
        (TRAIN, "config.zero_stage", 3, ("config.zero_stage", "3")),
        (TRAIN, "implementation", "deepspeed", ("deepspeed", "nanotron")),
        (TRAIN, "method", "lora", ("lora", "full")),
        (TRAIN, "task", "sing", ("task", "sing", "generate")),
    ],
)
def test_a_bad_case_is_one_sentence(case: dict[str, Any], path: str, value: Any, words: tuple[str, ...]) -> None:
    bad = changed(case, path, value)
    found = answer(bad)
    assert found.keys() == {"id", "error"}
    assert found["id"] == bad.get("id")
    assert "\n" not in found["error"]
    for word in words:
        assert word in found["error"]


def test_transformers_training_is_checked_before_anything_is_traced() -> None:
    case = changed(changed(TRAIN, "implementation", ...), "config", {"engine": "pytorch", "micro_batch_size": 1})
    refused = answer(changed(case, "config.zero_stage", 1))
    assert "zero_stage 1" in refused["error"]
    refused = answer(changed(case, "workload.global_batch_size", 5))
    assert "global_batch_size 5" in refused["error"]


LORA = changed(TRAIN, "implementation", ...) | {
    "model": "Qwen/Qwen3-32B",
    "cluster": {"gpu": "H200-141GB"},
    "method": "lora",
    "config": {"engine": "pytorch", "micro_batch_size": 1, "activation_checkpointing": "full"},
}


@pytest.mark.slow
def test_methods_with_frozen_weights() -> None:
    """Of 32.76 B weights 61 GiB in bf16, or about 18 in 4 bits with an embedding and a head in bf16."""
    adapted, packed, wide = answers([LORA, LORA | {"method": "qlora"}, LORA | {"lora": {"rank": 256}}])
    assert adapted["breakdown"]["parameters"] / GIB == pytest.approx(61.5, abs=0.2)
    assert packed["breakdown"]["parameters"] / GIB == pytest.approx(18.0, abs=0.3)
    states = 16 * adapted["breakdown"]["optimizer_states"]
    assert wide["breakdown"]["optimizer_states"] == pytest.approx(states, rel=1e-4)  # Adam counts its steps besides
    assert packed["step_time_seconds"] > adapted["step_time_seconds"]


@pytest.mark.slow
def test_layers_on_the_gpus_of_one_process() -> None:
    """61 GiB of weights on two GPUs of 80 GB, of which one works at a time."""
    spread = changed(LORA, "cluster", {"gpu": "H100-80GB", "gpus_per_node": 2})
    spread = changed(spread, "config.device_map", "auto")
    found, refused = answers([spread, spread | {"method": "full"}])
    assert found["layers_of_gpus"] == [32, 32]
    assert found["gpu"] == 1
    assert found["fits"]
    assert found["breakdown"]["parameters"] / GIB == pytest.approx(61.5 / 2, abs=0.5)
    assert "device_map auto is for methods lora and qlora" in refused["error"]


@pytest.mark.parametrize(
    ("lora", "word"), [({"rank": 0}, "lora.rank"), ({"dropout": 0.1}, "lora.dropout"), ({"rank": 9999}, "lora_rank")]
)
def test_adapters_that_cannot_be(lora: dict[str, Any], word: str) -> None:
    assert word in answer(LORA | {"lora": lora})["error"]


def autotune(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autotune", "predict", "--cases", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_verb_answers_every_line_in_order(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    bad = {"id": 7, "model": "nope", "cluster": {"gpu": "H100-80GB"}, "config": {}}
    file.write_text("\n".join(json.dumps(case) for case in (GENERATE, bad)) + "\n\n" + json.dumps(TRAIN))
    run = autotune(file)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["id"] for line in lines] == ["g", 7, "t"]
    assert "error" in lines[1]
    assert lines[0] == answer(GENERATE)


@pytest.mark.parametrize("broken", ["{", "[1]", "3", "\x00", '"text"', "[" * 100_000])
def test_a_broken_file_is_refused_whole_with_its_line(tmp_path: Path, broken: str) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps(GENERATE) + "\n" + broken + "\n")
    with pytest.raises(UsageError, match="line 2"):
        read_cases(file)


def test_a_broken_file_prints_no_answer(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps(GENERATE) + "\nnonsense\n")
    run = autotune(file)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "line 2" in run.stderr
    assert autotune(tmp_path / "absent.jsonl").returncode == 2
