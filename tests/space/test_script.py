"""A study of the user's own script: its section, its knobs as axes, and what is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from autotune.errors import InvalidSpaceError
from autotune.predict.plan import plan_memory
from autotune.predict.remedies import remedies
from autotune.predict.tracing import structures_of
from autotune.space.space import Space, load_space
from tests.samples import sample_space

COMMAND = "python train.py {training_args} --optim {optim}"
SEARCH: dict[str, Any] = {
    "engine": "pytorch",
    "zero_stage": 0,
    "precision": "fp32",
    "micro_batch_size": [1, 2],
    "activation_checkpointing": ["none", "full"],
    "script": {"optim": ["adamw", "lion"]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text("")
    return tmp_path


def script_space(folder: Path, section: dict[str, Any] | None = None, **search: Any) -> Space:
    given = {key: value for key, value in {**SEARCH, **search}.items() if value is not ...}
    return sample_space(folder, script={"command": COMMAND, **(section or {})}, search=given, baseline=...)


def test_knobs_are_axes(folder: Path) -> None:
    space = script_space(folder)
    assert len(space.candidates) == 2 * 2 * 2
    assert space.axes["script.optim"] == ("adamw", "lion")
    first, second = space.candidates[:2]
    assert (first.script, second.script) == ((("optim", "adamw"),), (("optim", "lion"),))
    assert first.fingerprint != second.fingerprint
    assert type(first).from_dict(first.to_dict()) == first
    assert second.describe().endswith("optim lion")
    assert all(config in space for config in space.candidates)
    assert space.values(second)["script.optim"] == "lion"
    run = space.script
    assert run is not None
    assert run.command == ("python", "train.py", "{training_args}", "--optim", "{optim}")
    assert run.folder == str(folder)


def test_the_script_belongs_to_what_is_compared(folder: Path) -> None:
    one, other = script_space(folder), script_space(folder, {"environment": {"FAST": True}})
    assert one.identity != other.identity
    assert other.script is not None
    assert other.script.environment == (("FAST", "true"),)
    assert script_space(folder, {"predict_as": "engine"}).identity == one.identity


def test_nothing_is_predicted_unless_it_is_asked_for(folder: Path) -> None:
    plan = plan_memory(script_space(folder))
    assert not plan.knows_memory
    assert not plan.surely_too_big.any()
    assert not plan.fits.any()
    assert plan.times is None
    assert remedies(plan) == []
    assert sum(plan.unpredicted.values()) == 8
    asked = script_space(folder, {"predict_as": "engine"})
    adamw, lion = (structures_of(asked, config) for config in asked.candidates[:2])
    assert adamw == lion  # the knob is the script's own: one trace tells both


@pytest.mark.parametrize(
    ("script", "search", "words"),
    [
        ({"command": "python train.py {batch}"}, {}, r"script\.command: found the placeholder {batch}; there are"),
        ({"command": "python train.py {"}, {}, r"script\.command: found '\{', in which a brace"),
        ({"command": "python 'train.py"}, {}, r"script\.command: found .* no closing quotation"),
        ({"command": []}, {}, r"script\.command: found \[\]"),
        ({"command": "python other.py {training_args} {optim}"}, {}, r"'other.py', which is no file in"),
        ({"command": "python train.py {training_args}"}, {}, r"search\.script\.optim: is passed nowhere; write"),
        ({"command": "python train.py {optim}"}, {}, "activation_checkpointing: has 2 values, but .* pass"),
        ({}, {"attention": ["sdpa", "eager"]}, r"search\.attention: has 2 values, .* neither {attention} nor a file"),
        ({}, {"engine": ...}, None),
        ({"command": "python train.py {micro_batch_size} {optim}"}, {"engine": ...}, "engine: has 2 values by def"),
        ({}, {"script": {"optim": "adamw", "seed": 1}}, r"search\.script: found 'seed'; a knob is named"),
        ({}, {"script": {"optim": "adamw", "a-b": 1}}, r"search\.script: found 'a-b'; a knob is named"),
        ({"environment": {"A B": "1"}}, {}, r"script\.environment: found 'A B'; a variable is named"),
        ({"environment": {"A": "{nothing}"}}, {}, r"script\.environment\.A: found the placeholder {nothing}"),
        ({"launch": "ssh"}, {}, r"script\.launch: found 'ssh'"),
        (
            {"command": "accelerate launch {accelerate} {micro_batch_size} {activation_checkpointing} {optim}"},
            {"engine": "deepspeed"},
            "add --deepspeed_config_file {ds_config}",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, script: dict[str, Any], search: dict[str, Any], words: str | None
) -> None:
    if words is None:
        assert script_space(folder, script, **search).candidates
        return
    with pytest.raises(InvalidSpaceError, match=words) as caught:
        script_space(folder, script, **search)
    assert "\n" not in str(caught.value)


def test_knobs_without_a_script_and_targets_beside_one(folder: Path) -> None:
    with pytest.raises(InvalidSpaceError, match="has knobs, but there is no script"):
        sample_space(folder, search=SEARCH, baseline=...)
    with pytest.raises(InvalidSpaceError, match="targets: stands beside script"):
        sample_space(folder, script={"command": COMMAND}, search=SEARCH, baseline=..., targets=["hf_trainer"])
    with pytest.raises(InvalidSpaceError, match=r"baseline\.script: found 'other'"):
        sample_space(folder, script={"command": COMMAND}, search=SEARCH, baseline={"script": {"other": 1}})


def test_a_file_that_cannot_say_a_value_refuses_it(folder: Path) -> None:
    space = script_space(folder, zero_stage=[0, 3])
    assert {config.zero_stage for config in space.candidates} == {0}
    (reason,) = space.illegal
    assert (
        reason == "{training_args} cannot say it: accelerate shards by FSDP2 on GPUs alone, on CPU it silently runs DDP"
    )
    assert "zero_stage" in {dropped.axis for dropped in space.dropped}


def test_the_shipped_example_is_legal() -> None:
    space = load_space(Path(__file__).parents[2] / "search_spaces" / "own-script.yaml")
    assert len(space.candidates) == 120
    assert not space.illegal
