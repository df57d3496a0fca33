"""The exported train.py on gloo ranks: it trains on given tokens as the winner was measured, and keeps the weights."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

from autotune.export import FORMATS, export_best
from autotune.modeling.build import build_model, materialize
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model
from autotune.spec.outcome import Outcome
from autotune.store.store import open_store
from autotune.study import Study
from tests.samples import measurement, sample_space

BATCH, LENGTH = 4, 32
MODEL = load_model("qwen3-tiny", Path())


def best_folder(folder: Path, layout: dict[str, object], gpus: int, method: str = "full", gpu: str = "cpu") -> Path:
    """The best folder of a study whose only fast trial has the layout."""
    search = {"engine": "pytorch", "precision": "fp32", "zero_stage": [0, 3], "micro_batch_size": [1, 2]}
    searched = search | {
        axis: sorted({1, value}) if isinstance(value, int) else value for axis, value in layout.items()
    }
    if "optimizer" in searched:
        searched["numerics"] = {"optimizer": searched.pop("optimizer")}
    space = sample_space(
        folder,
        search=searched,
        baseline=...,
        cluster={"nodes": 1, "gpus_per_node": gpus, "gpu": gpu, "memory_bytes": "60MiB"},
        workload={"global_batch_size": BATCH, "sequence_length": LENGTH, "learning_rate": 1e-3},
        budget={"trials": 50},
        **({} if method == "full" else {"method": method, "targets": ["autotune"]}),
    )

    def outcome(config: TrialConfig) -> Outcome:
        wanted = all(getattr(config, axis) == value for axis, value in layout.items())
        return measurement(1000.0 if wanted else 10.0)

    with open_store(f"sqlite:///{folder}/a.db", create=True) as store:
        study = Study.open(space, store)
        left = iter(study.space.candidates)
        while attempt := study.next_attempt(lambda: next((c for c in left if not study.known(c)), None)):
            study.record(attempt, outcome(attempt.config))
        files = export_best(study, folder / "out")
    assert "train.py" in files
    return files["train.py"].parent


def run(script: Path, ranks: int, *arguments: object) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss ([0-9.]+)", output)]


def plain_loss(model: torch.nn.Module, tokens: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    ids = torch.from_numpy(tokens[: BATCH * LENGTH].reshape(BATCH, LENGTH))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({"tensor_parallel_size": 2, "loss": "chunked"}, 2),
        pytest.param({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, 4, marks=pytest.mark.slow),
        pytest.param({"sequence_parallel_size": 2, "zero_stage": 3}, 2, marks=pytest.mark.slow),
        pytest.param({"loss": "chunked", "zero_stage": 3}, 2, marks=pytest.mark.slow),
        pytest.param(
            {"loss": "chunked", "zero_stage": 3, "optimizer": "adamw_torch_8bit"},
            2,
            marks=[
                pytest.mark.slow,
                pytest.mark.timeout(900),  # both ranks compile the update
                pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: '.[adamw-torch-8bit]'"),
            ],
        ),
    ],
)
def test_it_trains_on_given_tokens_and_keeps_the_weights(tmp_path: Path, layout: dict[str, object], ranks: int) -> None:
    script = best_folder(tmp_path, layout, ranks) / "train.py"
    tokens = np.random.default_rng(1).integers(0, MODEL.vocab_size, size=2 * BATCH * LENGTH + 5)
    np.save(tmp_path / "tokens.npy", tokens)
    trained = losses(run(script, ranks, "--data", tmp_path / "tokens.npy", "--out", tmp_path / "weights"))
    fresh = build_model(MODEL, "sdpa")
    materialize(fresh, torch.device("cpu"), torch.float32, seed=1)
    assert trained[0] == pytest.approx(plain_loss(fresh, tokens), abs=1e-4)
    assert len(trained) == 2
    index = json.loads((tmp_path / "weights" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {name for name, _ in fresh.named_parameters()}
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", dtype=torch.float32)
    after = plain_loss(kept, tokens)
    assert after < trained[0] - 0.01
    again = run(script, ranks, "--data", tmp_path / "tokens.npy", "--model", tmp_path / "weights", "--steps", 1)
    assert losses(again)[0] == pytest.approx(after, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({"zero_stage": 3}, 2),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, 4),
        ({"device_map": ["auto"], "zero_stage": [0]}, 1),
    ],
)
def test_it_keeps_adapters(tmp_path: Path, layout: dict[str, object], ranks: int) -> None:
    if "device_map" in layout:  # of a study on GPUs; one process has both
        script = best_folder(tmp_path, layout, 2, "lora", "H100-80GB") / "train.py"
    else:
        script = best_folder(tmp_path, layout, ranks, "lora") / "train.py"
    tokens = np.random.default_rng(1).integers(0, MODEL.vocab_size, size=4 * BATCH * LENGTH)
    np.save(tmp_path / "tokens.npy", tokens)
    base = build_model(MODEL, "sdpa")
    materialize(base, torch.device("cpu"), torch.float32, seed=7)
    base.save_pretrained(tmp_path / "base")
    given = ("--data", tmp_path / "tokens.npy", "--model", tmp_path / "base")
    trained = losses(run(script, ranks, *given, "--learning-rate", 1e-2, "--out", tmp_path / "adapters"))
    assert trained[0] == pytest.approx(plain_loss(base, tokens), abs=1e-4)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapters")
    assert plain_loss(adapted, tokens) < trained[0] - 0.01


@pytest.mark.parametrize(
    ("targets", "written"), [(["hf_trainer", "autotune"], True), (["accelerate", "autotune"], False)]
)
def test_it_is_written_where_no_other_target_of_the_study_runs_the_winner(
    tmp_path: Path, targets: list[str], written: bool
) -> None:
    search = {"engine": "pytorch", "activation_checkpointing": "selective_ops", "zero_stage": 3, "micro_batch_size": 1}
    space = sample_space(tmp_path, search=search, baseline=..., targets=targets)
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as store:
        study = Study.open(space, store)
        attempt = study.next_attempt(lambda: space.candidates[0])
        assert attempt is not None
        study.record(attempt, measurement())
        best = study.best()
        assert best is not None
        assert FORMATS["train-script"].wanted(study, best) is written


def test_it_alone_is_not_always_written() -> None:
    assert FORMATS["train-script"].fallback
    assert not any(form.fallback for name, form in FORMATS.items() if name != "train-script")
