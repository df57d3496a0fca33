"""Whatever is typed or lies on disk: the exit code of its kind, one sentence, and nothing half-written."""

import json
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from autotune.cli.main import main
from autotune.store.store import open_store
from autotune.study import Study
from tests.samples import sample_space, space_text
from tests.space.test_mutations import restructured, scribbled

Autotune = Callable[..., tuple[int, str]]
CLUSTER = {"gpus_per_node": 2, "gpu": "cpu", "memory_bytes": "60MiB"}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


@pytest.fixture
def autotune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs the command line in an empty folder; gives the exit code and the sentence."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # `tune` sets them
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["autotune", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert list(here.iterdir()) == []
        code = exit_.value.code
        assert isinstance(code, int)
        if not err.startswith("Usage:"):
            assert err.lower().startswith("error: ")
            assert err.count("\n") == 1, err
        return code, err

    return run


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"workload": {"global_batch_size": "many", "sequence_length": 64}}, 2, "global_batch_size: found 'many'"),
        ({"workload": {"global_batch_size": 16, "sequence_length": 10**30}}, 2, "workload.sequence_length"),
        ({"workload": {"global_batch_size": 16, "sequence_length": 64, "learning_rate": "nan"}}, 2, "learning_rate"),
        ({"budget": {"trials": 4, "minutes": True}}, 2, "budget.minutes: found True"),
        ({"search": {"zero_stage": []}}, 2, "search.zero_stage: found []; an axis needs at least one value"),
        ({"search": {"deepspeed": {"wall_clock_breakdown": [float("inf")]}}}, 2, "deepspeed.wall_clock_breakdown"),
        ({"search": {"deepspeed": {"steps_per_print": [5]}}}, 2, "steps_per_print"),
        ({"search": {"micro_batch_size": 32}}, 3, "micro_batch_size 32 x data_parallel_size 2"),
        ({"search": {"gpus": 4}}, 3, "gpus 4 is more than the cluster's 2"),
        ({"cluster": CLUSTER | {"memory_bytes": "900 parsecs"}}, 2, "memory_bytes: found '900 parsecs'; a size is"),
        ({"cluster": CLUSTER | {"nodes": 0}}, 2, "cluster.nodes: found 0"),
        ({"model": "~nobody-of-this-name/model"}, 2, "nobody-of-this-name"),
        ({"model": "x" * 400}, 2, "neither a shipped architecture"),
        ({"model": "two\nlines"}, 2, "printable"),
        ({"study": "../elsewhere"}, 2, "study: found '../elsewhere'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_space_that_is_wrong(
    tmp_path: Path, autotune: Autotune, changes: dict[str, Any], code: int, words: str
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text(baseline=..., **changes))
    found, sentence = autotune("tune", path)
    assert found == code
    assert words in sentence
    assert str(path) in sentence


def test_paths_that_are_no_readable_file(tmp_path: Path, autotune: Autotune) -> None:
    pipe, huge, closed = tmp_path / "pipe", tmp_path / "huge.yaml", tmp_path / "closed.yaml"
    os.mkfifo(pipe)
    huge.write_bytes(b"#" * (1024**2 + 1))
    closed.write_text(space_text())
    closed.chmod(0)
    cases = [
        (pipe, "no regular file"), ("/dev/zero", "no regular file"), (tmp_path, "Is a directory"),
        (huge, "at most 64.0 KiB"), ("none.yaml", "No such file"), ("a" * 5000, "File name too long"),
    ]  # fmt: skip
    if os.geteuid():
        cases.append((closed, "Permission denied"))
    for path, words in cases:
        code, sentence = autotune("tune", path)
        assert (code, words in sentence) == (2, True), sentence


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ("null", "holds a NoneType"),
        (" " * (1024**2 + 1), "bytes, but"),
        (json.dumps({**CONFIG, "model_type": "mamba"}), "found model_type 'mamba'"),
        (json.dumps({**CONFIG, "model_type": ["llama"] * 1000}), "found model_type ['llama'"),
        (json.dumps({**CONFIG, "vocab_size": None}), "found None as vocab_size"),
        (json.dumps({**CONFIG, "vocab_size": 10**400}), "as vocab_size"),
        (json.dumps({**CONFIG, "num_attention_heads": 5}), "no multiple of num_attention_heads 5"),
        (json.dumps({key: value for key, value in CONFIG.items() if key != "hidden_size"}), "found no hidden_size"),
        ("PIPE", "no regular file"),
    ],
    ids=range(11),
)
def test_a_model_folder_that_is_wrong(tmp_path: Path, autotune: Autotune, config: str | None, words: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if config == "PIPE":
        os.mkfifo(folder / "config.json")
    elif config is not None:
        (folder / "config.json").write_text(config)
    path = tmp_path / "space.yaml"
    path.write_text(space_text(model="./model"))
    code, sentence = autotune("tune", path)
    assert code == 2
    assert words in sentence
    assert str(path) in sentence
    assert len(sentence) < 600


def test_stores_that_cannot_be_used(tmp_path: Path, autotune: Autotune) -> None:
    space, text, folder = tmp_path / "space.yaml", tmp_path / "text.db", tmp_path / "folder.db"
    space.write_text(space_text())
    text.write_text("these are words, not a database" * 100)
    folder.mkdir()
    newer, empty = tmp_path / "newer.db", tmp_path / "empty.db"
    with open_store(f"sqlite:///{newer}", create=True) as store:
        Study.open(sample_space(tmp_path), store)
    connection = sqlite3.connect(newer)
    connection.execute("UPDATE autotune_schema SET version_num = '9999'")
    connection.commit()
    connection.close()
    empty.touch()
    before = {path: path.read_bytes() for path in (text, newer)}
    for url, words in (
        ("here.db", "is no database URL"),
        ("mysql://user:secret@host/db", "found database 'mysql'"),
        ("sqlite://", "would be lost"),
        ("postgresql://user:secret@127.0.0.1:1/db", "cannot be used"),
        ("postgresql://user:secret@127.0.0.1:port/db", "is no database URL"),
        (f"sqlite:///{text}", "not a database"),
        (f"sqlite:///{folder}", "cannot be used"),
        (f"sqlite:///{newer}", "newer than this Autotune knows"),
        (f"sqlite:///{text}/inside.db", "inside.db"),
    ):
        for arguments in (["studies"], ["show", "sample"], ["best", "sample"], ["tune", space]):
            code, sentence = autotune(*arguments, "--store", url)
            assert (code, words in sentence) == (2, True), sentence
            assert "secret" not in sentence
    code, sentence = autotune("studies", "--store", f"sqlite:///{empty}")
    assert (code, "holds no study yet" in sentence) == (2, True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_are_closed_to_us(tmp_path: Path, autotune: Autotune) -> None:
    space, closed = tmp_path / "space.yaml", tmp_path / "closed"
    space.write_text(space_text())
    closed.mkdir(mode=0o500)
    assert autotune("tune", space, "--out", closed / "out")[0] == 2
    assert autotune("tune", space, "--store", f"sqlite:///{closed}/a.db")[0] == 2
    assert list(closed.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:1", "Connection refused"),
        ("[::1]:1", "cannot be reached"),
        ("127.0.0.1:99999", "cannot be reached"),
        ("a cluster", "write HOST:PORT"),
        ("", "write HOST:PORT"),
    ],
)
def test_an_address_where_no_ray_is(tmp_path: Path, autotune: Autotune, address: str, words: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text())
    code, sentence = autotune("tune", path, "--address", address)
    assert code == 5
    assert words in sentence


def test_arguments_of_the_wrong_kind(tmp_path: Path, autotune: Autotune) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text())
    for arguments in (
        ["tune", path, "--seed", "text"], ["tune", path, "--seed"], ["tune", path, "--no-such-option"],
        ["tune", path, path], ["show"], ["best"], ["studies", "extra"], ["show", "sample", "1.5"],
    ):  # fmt: skip
        code, sentence = autotune(*arguments)
        assert code == 2
        assert "Error: " in sentence


def test_only_our_sampler_learns(tmp_path: Path, autotune: Autotune) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text())
    code, sentence = autotune("tune", path, "--learn", "--sampler", "tpe")
    assert code == 2
    assert "--sampler plan" in sentence


@given(restructured() | scribbled())
@settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_no_traceback_reaches_the_user(tmp_path: Path, autotune: Autotune, content: str | bytes) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    # A space that is good is stopped here.
    code, sentence = autotune("tune", path, "--out", path / "out")
    assert code in (2, 3, 5)
    assert str(path) in sentence or code == 5
