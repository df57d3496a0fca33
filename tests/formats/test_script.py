"""A command's placeholders: what they stand for in a trial and in a shell, and what is none."""

import json
import subprocess

import pytest
import yaml

from autotune.errors import UsageError
from autotune.formats.script import (
    FILES,
    allowed,
    axes_told,
    files,
    fill,
    fill_for_shell,
    names,
    values,
    with_accumulation,
)
from autotune.formats.training_args import to_training_args
from autotune.spec.config import TrialConfig
from autotune.spec.workload import Workload

CONFIG = TrialConfig(
    engine="deepspeed", gpus=4, micro_batch_size=2, sequence_length=128, zero_stage=2, script=(("lr_warmup", 0.1),)
)
WORK = Workload(global_batch_size=32, learning_rate=1e-5)


def test_values_of_config_work_and_knobs() -> None:
    found = values(CONFIG, WORK)
    assert found["micro_batch_size"] == "2"
    assert found["gradient_accumulation_steps"] == "4"
    assert (found["data_parallel_size"], found["global_batch_size"], found["learning_rate"]) == ("4", "32", "1e-05")
    assert (found["selective_every"], found["lr_warmup"]) == ("none", "0.1")
    assert set(found) | set(FILES) <= set(allowed(["lr_warmup"]))


def test_a_shorter_accumulation_is_a_smaller_global_batch() -> None:
    shorter = with_accumulation(WORK, CONFIG, 3)
    found = values(CONFIG, shorter)
    assert (found["gradient_accumulation_steps"], found["global_batch_size"]) == ("3", "24")
    assert shorter.learning_rate == WORK.learning_rate


def test_filling() -> None:
    assert fill("--batch={a}x{b}", {"a": "1", "b": "2"}) == "--batch=1x2"
    assert fill("{{{a}}}", {"a": "1"}) == "{1}"
    assert names(["{a}", "x{b}{a}", "plain"]) == {"a", "b"}


@pytest.mark.parametrize("word", ["{", "}", "{}", "{a!r}", "{a:>3}", "{a.b}", "{0}", "{a b}"])
def test_other_braces_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="a brace opens no placeholder such as"):
        names([word])


@pytest.mark.parametrize("word", ["a b", "$HOME", "it's{x}", "", "{x}{x}", "{{x}}", "`id`"])
def test_a_shell_reads_the_same_words(word: str) -> None:
    shell = fill_for_shell(word, {"x": '"$x"'})
    ran = subprocess.run(["sh", "-c", f"x='1 2'; printf %s {shell}"], capture_output=True, text=True, check=True)
    assert ran.stdout == fill(word, {"x": "1 2"})


def test_files_are_those_of_the_export() -> None:
    found = files(["training_args", "ds_config", "micro_batch_size"], CONFIG, WORK, 1, "cpu")
    assert set(found) == {"training_args", "ds_config"}
    assert yaml.safe_load(found["training_args"]) == to_training_args(CONFIG, WORK, "cpu")
    assert json.loads(found["ds_config"])["zero_optimization"]["stage"] == 2


def test_what_reaches_the_script() -> None:
    assert axes_told(["micro_batch_size", "knob"]) == {
        "micro_batch_size",
        "script.micro_batch_size",
        "knob",
        "script.knob",
    }
    assert "deepspeed" in axes_told(["ds_config"])
    assert "attention" not in axes_told(["training_args"])
