"""What is submitted, and what is refused before anything is sent."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from autotune.cluster_jobs.request import check_store, git_revision, job_request, output_folder
from autotune.errors import StoreError, UsageError
from tests.samples import space_text


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:///autotune.db", "sqlite:////ABSOLUTE"),
        ("postgresql://tuner:hunter2@db/studies", "PGPASSFILE"),
        ("postgresql://tuner@db/studies?password=hunter2", "PGPASSFILE"),
        ("mysql://db/studies", "postgresql"),
    ],
)
def test_a_store_that_a_job_cannot_use(url: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as raised:
        check_store(url)
    assert "hunter2" not in str(raised.value)


def test_a_store_that_a_job_can_use() -> None:
    check_store("sqlite:////shared/a.db")
    check_store("postgresql://tuner@db/studies")


def test_what_is_submitted(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    config = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
    config |= {"max_position_embeddings": 128, "tie_word_embeddings": True}
    (tmp_path / "models" / "mine" / "config.json").write_text(json.dumps(config))
    (tmp_path / "models" / "mine" / "model.safetensors").write_text("large")
    path = tmp_path / "my space.yaml"
    path.write_text(space_text(model="models/mine"))
    request = job_request(path, store="postgresql://tuner@db/studies", out=Path("/results"), sampler="random")
    assert shlex.split(request.entrypoint) == [
        "python", "-m", "autotune", "tune", "my space.yaml", "--store", "postgresql://tuner@db/studies",
        "--out", "/results", "--address", "auto", "--json", "--sampler", "random",
    ]  # fmt: skip
    assert (request.metadata["study"], request.metadata["model"]) == ("sample", "models/mine")
    assert "git" not in request.metadata
    assert request.metadata["autotune"][0].isdigit()
    assert job_request(path, store="sqlite:////a.db", installed=True).metadata["autotune"] == "installed"
    assert shlex.split(request.check)[3:] == [
        "doctor", "--quick", "--store", "postgresql://tuner@db/studies", "--out", "/results", "--json",
    ]  # fmt: skip
    sent = tmp_path / "sent"
    sent.mkdir()
    request.gather(sent)
    files = sorted(str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file())
    assert files == ["models/mine/config.json", "my space.yaml"]


def test_a_script_of_ones_own_is_submitted_too(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text("")
    (tmp_path / "scripts" / "data.bin").write_text("large")
    path = tmp_path / "space.yaml"
    search = {"engine": "pytorch", "zero_stage": 0}
    script = {"command": "python scripts/train.py {training_args}"}
    path.write_text(space_text(script=script, search=search, baseline=...))
    (tmp_path / "sent").mkdir()
    job_request(path, store="sqlite:////a.db").gather(tmp_path / "sent")
    files = {str(file.relative_to(tmp_path / "sent")) for file in (tmp_path / "sent").rglob("*") if file.is_file()}
    assert files == {"space.yaml", "scripts/train.py"}


def test_the_commit_of_a_space_file(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("a: 1\n")
    assert git_revision(path) is None
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "space.yaml"], [*who, "commit", "-qm", "x"], ["tag", "v1"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert git_revision(path) == head.stdout.strip()
    path.write_text("a: 2\n")
    assert git_revision(path) == f"{head.stdout.strip()}-dirty"


def test_where_the_files_go() -> None:
    assert output_folder(None, "sqlite:////shared/a.db", "x") == "/shared/autotune-out/x"
    assert output_folder(Path("/results"), "postgresql://db/studies", "x") == "/results"
    with pytest.raises(UsageError, match="--out is missing"):
        output_folder(None, "postgresql://db/studies", "x")
    with pytest.raises(UsageError, match="absolute"):
        output_folder(Path("results"), "sqlite:////shared/a.db", "x")
