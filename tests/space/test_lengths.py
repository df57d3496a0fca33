"""The lengths of a study's sequences, from its file to its candidates."""

from pathlib import Path
from typing import Any

import pytest

from autotune.errors import InvalidSpaceError, NothingFeasibleError
from autotune.space.space import Space
from autotune.spec.workload import lognormal_lengths
from tests.samples import SPACE, sample_space

PLAIN = {"engine": "pytorch", "zero_stage": 0, "micro_batch_size": [1, 2]}
ALL = ["fixed", "padded", "dynamic_padding", "packed"]


def space(folder: Path, lengths: Any = "fixed", **search: Any) -> Space:
    workload = {**SPACE["workload"], "lengths": lengths}
    return sample_space(folder, workload=workload, search={**PLAIN, **search}, baseline=...)


def test_sequences_have_one_length_by_default(tmp_path: Path) -> None:
    found, stated = sample_space(tmp_path), space(tmp_path)
    assert found.workload.lengths == ()
    assert found.axes["batching"] == ("fixed",)
    assert stated.identity == sample_space(tmp_path, search=PLAIN, baseline=...).identity
    assert "batching" not in found.candidates[0].to_dict()  # stores know such configs by their fingerprints


def test_a_file_of_lengths(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("30\n7\n500\n")
    found = space(tmp_path, {"file": "lengths.txt"}, batching=ALL)
    assert found.workload.lengths == (7, 30, 500)
    assert {config.batching for config in found.candidates} == {"padded", "dynamic_padding", "packed"}
    (dropped,) = (dropped for dropped in found.dropped if dropped.axis == "batching")
    assert "fixed is for sequences of one length" in dropped.reason
    assert found.identity != space(tmp_path).identity
    assert found.candidates[0].describe().endswith("padded")


def test_a_distribution_is_padded_to_the_longest_of_a_batch_by_default(tmp_path: Path) -> None:
    found = space(tmp_path, {"lognormal": {"median": 20, "sigma": 0.5}})
    assert found.workload.lengths == lognormal_lengths(20, 0.5)
    assert found.axes["batching"] == ("dynamic_padding",)


def test_what_packing_does_not_go_with(tmp_path: Path) -> None:
    lengths = {"lognormal": {"median": 20, "sigma": 0.5}}
    found = space(tmp_path, lengths, batching=["padded", "packed"], attention=["sdpa", "eager"])
    assert {(c.batching, c.attention) for c in found.candidates} == {
        ("padded", "sdpa"), ("padded", "eager"), ("packed", "sdpa")
    }  # fmt: skip
    assert min(config.micro_batch_size for config in found.candidates if config.batching == "packed") == 2
    with pytest.raises(NothingFeasibleError, match="which cuts sequences of one length"):
        space(tmp_path, lengths, loss="chunked", zero_stage=0)
    with pytest.raises(NothingFeasibleError, match="differ in length; say"):
        space(tmp_path, batching="packed")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is no file; write a length in tokens a line"),
        ("", "found nothing in"),
        ("12\nx\n", "found 'x' in"),
        ("0\n", "found '0' in"),
        ("-3\n", "found '-3' in"),
        ("1.5\n", "found '1.5' in"),
        ("9" * 12, "found '999999999999' in"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "lengths.txt").write_text(text)
    with pytest.raises(InvalidSpaceError, match=rf"workload\.lengths\.file: .*{words}"):
        space(tmp_path, {"file": "lengths.txt"})


@pytest.mark.parametrize("lengths", ["long", {}, {"lognormal": {"median": 0, "sigma": 1}}, {"file": 3}, {"files": "x"}])
def test_other_lengths_are_refused(tmp_path: Path, lengths: Any) -> None:
    with pytest.raises(InvalidSpaceError, match=r"workload\.lengths") as caught:
        space(tmp_path, lengths)
    assert "\n" not in str(caught.value)
