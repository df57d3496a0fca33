"""The search-space file: what is read, and that every mistake is one sentence naming the key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.errors import AutotuneError, InvalidSpaceError
from autotune.space.file import parse_space, read_space_file
from autotune.space.space import load_space
from tests.samples import SPACE, space_text


def test_reads_axes_scalars_and_sizes() -> None:
    file = parse_space(space_text(search={"engine": "pytorch", "micro_batch_size": [1, 2]}), "s.yaml")
    assert file.search.engine == ["pytorch"]
    assert file.search.micro_batch_size == [1, 2]
    assert file.cluster != "auto"
    assert file.cluster.memory_bytes == 60 * 1024**2


def test_yaml_floats_without_a_dot_are_numbers() -> None:
    search = {"engine": "deepspeed", "deepspeed": {"zero_optimization.reduce_bucket_size": ["5e7", 5.0e8]}}
    file = parse_space(space_text(search=search), "s.yaml")
    assert file.search.deepspeed == {"zero_optimization.reduce_bucket_size": [50_000_000, 500_000_000]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"serach": {}}, ["serach", "is not a key", "search"]),
        ({"b[a]": 1}, ["b[a]: is not a key", "allowed here: "]),
        ({"cluster": {"gpus_per_node": 2, "gpu": "cpu", "str": 1}}, ["cluster.str: is not a key", "allowed here: "]),
        (
            {"search": {"micro_batch": [1]}},
            ["search.micro_batch", "is not a key", "allowed here: micro_batch_size, ", " more"],
        ),
        ({"search": {"micro_batch_size": []}}, ["search.micro_batch_size", "at least one value"]),
        ({"search": {"micro_batch_size": [1, 1]}}, ["search.micro_batch_size", "twice"]),
        ({"search": {"micro_batch_size": ["big"]}}, ["search.micro_batch_size", "'big'", "integer"]),
        ({"search": {"zero_stage": [4]}}, ["search.zero_stage", "4", "3"]),
        ({"search": {"precision": ["int8"]}}, ["search.precision", "'int8'", "bf16"]),
        ({"search": {"engine": "megatron"}}, ["search.engine", "'megatron'", "deepspeed"]),
        ({"budget": ...}, ["budget", "is missing"]),
        ({"budget": {"trials": 0}}, ["budget.trials", "0"]),
        ({"workload": {"global_batch_size": 16}}, ["workload.sequence_length", "is missing"]),
        ({"study": "a b"}, ["study", "'a b'"]),
        ({"memory_headroom": 1.5}, ["memory_headroom", "1.5"]),
        ({"task": "generate"}, ["task", "'generate'", "train"]),
        (
            {"cluster": {"gpus_per_node": 2, "gpu": "cpu", "memory_bytes": "much"}},
            ["cluster.memory_bytes", "'much'", "MiB"],
        ),
        ({"cluster": "here"}, ["cluster", "'here'"]),
        ({"cluster": {"gpus_per_node": 2}}, ["cluster.gpu", "is missing"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidSpaceError) as caught:
        parse_space(space_text(**changes), "s.yaml")
    message = str(caught.value)
    assert message.startswith("s.yaml")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["", "- a\n- b", "just words", "a: [1", "a: !!python/object:os.system x", "\tx: 1"])
def test_text_that_is_no_mapping(text: str) -> None:
    with pytest.raises(InvalidSpaceError) as caught:
        parse_space(text, "s.yaml")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary, huge = tmp_path / "binary.yaml", tmp_path / "huge.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    huge.write_text("#" * (2 * 1024**2))
    for path, words in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "cannot be read"),
        (binary, "UTF-8"),
        (huge, "at most"),
    ):
        with pytest.raises(InvalidSpaceError, match=words):
            read_space_file(path)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The sample document with one key somewhere replaced, added or removed."""
    document: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SPACE))
    place = document
    while True:
        key = draw(st.sampled_from([*place, "unknown"]))
        if isinstance(place.get(key), dict) and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(junk)
        else:
            place.pop(key, None)
        return document


@given(mutated())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_file_is_read_or_refused_in_one_sentence(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    message = ""
    try:
        load_space(path)
    except AutotuneError as error:
        message = str(error)
    assert "\n" not in message
