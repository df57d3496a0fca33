"""A real Hugging Face Trainer, started by the exported files on two CPU ranks, trains as the winner was measured.

What it did is observed in the run (tests/hf_training_script.py), not read back from the files.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from autotune.export import export_best
from autotune.store.store import open_store
from autotune.study import Study
from tests.samples import measurement, sample_space

SCRIPT = Path(__file__).with_name("hf_training_script.py")
ON_CPU = {"nodes": 1, "gpus_per_node": 2, "gpu": "cpu", "memory_bytes": "60MiB"}
# accelerate has FSDP2 on GPUs alone: the files come from a GPU study, and the script has accelerate believe in GPUs.
ON_GPU = {"nodes": 1, "gpus_per_node": 2, "gpu": "H100-80GB"}
BUCKETS = {"zero_optimization.reduce_bucket_size": 100_000, "zero_optimization.stage3_prefetch_bucket_size": 100_000}
STEPS, RANKS, LAYERS = 5, 2, 4


def export(tmp_path: Path, cluster: dict[str, Any], search: dict[str, Any], method: str = "full") -> Path:
    """The best folder of a study whose one candidate was measured, with a user's own arguments added to a copy."""
    workload = {"global_batch_size": 8, "sequence_length": 64, "learning_rate": 2e-5, "max_gradient_norm": 0.5}
    space = sample_space(tmp_path, cluster=cluster, workload=workload, search=search, baseline=..., method=method)
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as store:
        study = Study.open(space, store)
        attempt = study.next_attempt(lambda: space.candidates[0])
        assert attempt is not None
        study.record(attempt, measurement(device_bytes=space.cluster.memory_bytes))
        folder = export_best(study, tmp_path)["training_args.yaml"].parent
    exported = (folder / "training_args.yaml").read_text()
    assert ("use_cpu: true" in exported) == (cluster is ON_CPU)
    mine = {"output_dir": f"{tmp_path}/trainer", "max_steps": STEPS, "save_strategy": "no", "report_to": "none"}
    mine |= {"disable_tqdm": True} | ({} if cluster is ON_CPU else {"use_cpu": True})
    (folder / "mine.yaml").write_text(exported + "".join(f"{key}: {json.dumps(mine[key])}\n" for key in mine))
    return folder.rename(tmp_path / "moved")  # the folder is no place


def run(folder: Path, *command: object, adds_arguments: bool = False) -> dict[str, Any]:
    """Run a command from elsewhere than the folder; what rank 0 of the script reports.

    Args:
        folder: with the exported files.
        command: that the script and its arguments are to follow.
        adds_arguments: whether the command itself says where training_args.yaml is.
    """
    report = folder / "report.json"
    given = [] if adds_arguments else [folder / "mine.yaml"]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    arguments = [str(part) for part in (*command, SCRIPT, *given, report)]
    ran = subprocess.run(arguments, env=environment, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-6000:]
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def assert_trained(
    report: dict[str, Any], *, micro_batch_size: int, accumulation: int, every: int | None, ranks: int = RANKS
) -> None:
    """What passed through the model is the measured batch, in bf16, and layers were run again in the backward pass."""
    assert report["steps"] == STEPS
    assert 6 < report["loss"] < 8  # that of random weights: the logarithm of the vocabulary
    assert report["rows"] == [[micro_batch_size] * (STEPS * accumulation)] * ranks
    once = STEPS * accumulation
    assert report["passes"] == [once * (1 + (every is not None and layer % every == 0)) for layer in range(LAYERS)]
    assert report["dtypes"] == ["torch.bfloat16"]


def test_a_deepspeed_winner(tmp_path: Path) -> None:
    search = {"engine": "deepspeed", "zero_stage": 3, "micro_batch_size": 2, "deepspeed": BUCKETS}
    folder = export(tmp_path, ON_CPU, {**search, "activation_checkpointing": "full"})
    report = run(folder, "torchrun", "--standalone", "--nproc-per-node", RANKS)
    assert_trained(report, micro_batch_size=2, accumulation=2, every=1)
    assert report["sharding"] == {
        "wrapper": "deepspeed",
        "zero_stage": 3,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "global_batch_size": 8,
        "bf16": True,
        "clipping": 0.5,
        "reduce_bucket_size": 100_000,
        "optimizer": {"lr": 2e-5, "weight_decay": 0.0},
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["trainer", "accelerate"])
def test_a_winner_whose_ranks_share_sequences(tmp_path: Path, mode: str) -> None:
    search = {"engine": "deepspeed", "zero_stage": 3, "micro_batch_size": 2, "sequence_parallel_size": 2}
    folder = export(tmp_path, ON_CPU, {**search, "deepspeed": BUCKETS, "activation_checkpointing": "full"})
    shutil.copy(folder / "mine.yaml", folder / "training_args.yaml")
    report = run(folder, folder / "launch.sh", mode, adds_arguments=mode == "trainer")
    assert_trained(report, micro_batch_size=2, accumulation=4, every=1)
    assert report["tokens_of_a_row"] == [32]
    assert report["sharding"]["global_batch_size"] == 8


FSDP2 = {
    "wrapper": "fsdp2",
    "layers_wrapped": [LAYERS, LAYERS],
    "policies": ["torch.bfloat16 torch.bfloat16"],
    "weights": ["torch.float32"],
    "shards": ["DTensor"],
}


def test_an_fsdp2_winner(tmp_path: Path) -> None:
    search = {"engine": "pytorch", "zero_stage": 3, "micro_batch_size": 1, "activation_checkpointing": "full"}
    report = run(export(tmp_path, ON_GPU, search), "torchrun", "--standalone", "--nproc-per-node", RANKS)
    assert_trained(report, micro_batch_size=1, accumulation=4, every=1)
    assert report["sharding"] == {**FSDP2, "reshard_after_forward": [True]}


def assert_adapters_alone_trained(report: dict[str, Any]) -> None:
    assert len(report["trained"]) == LAYERS * 7 * 2  # A and B beside each matrix
    assert all(".lora_" in name for name in report["trained"])


@pytest.mark.slow
def test_an_fsdp2_winner_with_adapters(tmp_path: Path) -> None:
    """Layer by layer: the way that the README leaves to the script is not the one that gathers all layers at once."""
    search = {"engine": "pytorch", "zero_stage": 3, "micro_batch_size": 1, "activation_checkpointing": "full"}
    report = run(export(tmp_path, ON_GPU, search, "lora"), "torchrun", "--standalone", "--nproc-per-node", RANKS)
    assert_trained(report, micro_batch_size=1, accumulation=4, every=1)
    assert_adapters_alone_trained(report)
    weights = ["torch.bfloat16", "torch.float32"]
    assert report["sharding"] == {**FSDP2, "reshard_after_forward": [True], "weights": weights}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_winner_with_adapters(tmp_path: Path, stage: int) -> None:
    search = {"engine": "deepspeed", "zero_stage": stage, "micro_batch_size": 2, "deepspeed": BUCKETS}
    folder = export(tmp_path, ON_CPU, {**search, "activation_checkpointing": "full"}, "lora")
    report = run(folder, "torchrun", "--standalone", "--nproc-per-node", RANKS)
    assert_trained(report, micro_batch_size=2, accumulation=2, every=1)
    assert_adapters_alone_trained(report)
    assert report["sharding"]["zero_stage"] == stage


@pytest.mark.slow
def test_an_fsdp2_winner_by_accelerate_launch(tmp_path: Path) -> None:
    search = {"engine": "pytorch", "zero_stage": 2, "micro_batch_size": 2, "activation_checkpointing": "selective"}
    folder = export(tmp_path, ON_GPU, {**search, "selective_every": 2})
    report = run(folder, folder / "launch.sh", "accelerate")
    assert_trained(report, micro_batch_size=2, accumulation=2, every=2)
    assert report["sharding"] == {**FSDP2, "reshard_after_forward": [False]}


@pytest.mark.slow
def test_a_deepspeed_winner_by_accelerate_launch(tmp_path: Path) -> None:
    search = {"engine": "deepspeed", "zero_stage": 2, "micro_batch_size": 4, "deepspeed": BUCKETS}
    folder = export(tmp_path, ON_CPU, {**search, "activation_checkpointing": "none"})
    report = run(folder, folder / "launch.sh", "accelerate")
    assert_trained(report, micro_batch_size=4, accumulation=1, every=None)
    assert report["sharding"]["zero_stage"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "stage"), [("deepspeed", 2), ("deepspeed", 3), ("pytorch", 0)])
def test_a_winner_with_states_of_8_bits(tmp_path: Path, engine: str, stage: int) -> None:
    search = {"engine": engine, "zero_stage": stage, "micro_batch_size": 2, "activation_checkpointing": "full"}
    keys = {"deepspeed": BUCKETS} if engine == "deepspeed" else {}
    folder = export(tmp_path, ON_CPU, {**search, **keys, "numerics": {"optimizer": "adamw_8bit"}})
    report = run(folder, "torchrun", "--standalone", "--nproc-per-node", RANKS)
    assert_trained(report, micro_batch_size=2, accumulation=2, every=1)
    assert report["optimizer"] == "bitsandbytes.optim.adamw.AdamW 8 bits"


@pytest.mark.slow
@pytest.mark.timeout(900)  # both ranks compile the update
@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: '.[adamw-torch-8bit]'")
def test_an_fsdp2_winner_with_states_of_8_bits(tmp_path: Path) -> None:
    search = {"engine": "pytorch", "zero_stage": 3, "micro_batch_size": 1, "activation_checkpointing": "full"}
    folder = export(tmp_path, ON_GPU, {**search, "numerics": {"optimizer": "adamw_torch_8bit"}})
    report = run(folder, "torchrun", "--standalone", "--nproc-per-node", RANKS)
    assert_trained(report, micro_batch_size=1, accumulation=4, every=1)
    assert report["optimizer"] == "torchao.optim.adam.AdamW8bit, blocks of 256"
    assert report["sharding"] == {**FSDP2, "reshard_after_forward": [True]}


@pytest.mark.slow
def test_a_ddp_winner(tmp_path: Path) -> None:
    search = {"engine": "pytorch", "zero_stage": 0, "micro_batch_size": 2, "activation_checkpointing": "full"}
    report = run(export(tmp_path, ON_CPU, search), "torchrun", "--standalone", "--nproc-per-node", RANKS)
    assert_trained(report, micro_batch_size=2, accumulation=2, every=1)
    assert report["sharding"] == {"wrapper": "ddp"}


def test_a_winner_with_layers_on_the_gpus_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer takes the model for one on several GPUs: it neither moves nor copies it, and needs no launcher."""
    search = {"engine": "pytorch", "zero_stage": 0, "micro_batch_size": 2, "activation_checkpointing": "full"}
    folder = export(tmp_path, ON_GPU, {**search, "device_map": "auto"}, "lora")
    (folder / "mine.yaml").rename(folder / "training_args.yaml")
    monkeypatch.setenv("DEVICE_MAP", "auto")
    report = run(folder, folder / "launch.sh", "trainer", adds_arguments=True)
    assert_trained(report, micro_batch_size=2, accumulation=4, every=1, ranks=1)
    assert_adapters_alone_trained(report)
    assert report["sharding"] == {
        "wrapper": "Qwen3ForCausalLM",
        "is_model_parallel": True,
        "n_gpu": 1,
        "hooked_layers": LAYERS,
        "weights": ["torch.bfloat16", "torch.float32"],
    }
