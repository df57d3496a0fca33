"""The best folder: each file from a measured trial, whole or not at all, the same bytes every time."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from autotune.errors import NothingFeasibleError, UsageError
from autotune.export import FORMATS, export_best, export_files, export_pareto
from autotune.formats.accelerate_yaml import to_accelerate
from autotune.formats.deepspeed_json import to_deepspeed, to_hf_deepspeed
from autotune.formats.training_args import to_training_args
from autotune.spec.config import TrialConfig
from autotune.spec.outcome import Outcome
from autotune.store.store import SqlStore, open_store
from autotune.study import Study
from tests.samples import failure, measurement, sample_space, simulate

GPUS = {"nodes": 1, "gpus_per_node": 2, "gpu": "H100-80GB"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as opened:
        yield opened


def finished_study(tmp_path: Path, store: SqlStore, outcome: Callable[[TrialConfig], Outcome], **changes: Any) -> Study:
    study = Study.open(sample_space(tmp_path, budget={"trials": 500}, **changes), store)
    left = iter(study.space.candidates)
    while attempt := study.next_attempt(lambda: next((c for c in left if not study.known(c)), None)):
        study.record(attempt, outcome(attempt.config))
    return study


def test_every_file_is_from_the_winner_if_it_can_express_it(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate)
    files = export_best(study, tmp_path / "out")
    winner = study.best()
    assert winner is not None
    assert winner.config.engine == "deepspeed"
    assert set(files) == {
        "best.yaml",
        "training_args.yaml",
        "ds_config.hf.json",
        "ds_config.json",
        "accelerate.yaml",
        "launch.sh",
        "provenance.json",
        "README.md",
    }
    sources = json.loads(files["provenance.json"].read_text())["files"]
    assert {source["trial"] for source in sources.values()} == {winner.trial}
    best = yaml.safe_load(files["best.yaml"].read_text())
    assert TrialConfig.from_dict(best["config"]) == winner.config
    workload = study.space.workload
    assert json.loads(files["ds_config.json"].read_text()) == to_deepspeed(winner.config, workload)
    assert json.loads(files["ds_config.hf.json"].read_text()) == to_hf_deepspeed(winner.config, workload)
    arguments = yaml.safe_load(files["training_args.yaml"].read_text())
    assert arguments == to_training_args(winner.config, workload, "cpu")
    assert arguments["use_cpu"]
    assert yaml.safe_load(files["accelerate.yaml"].read_text()) == to_accelerate(winner.config, 1, "cpu")
    assert "cannot express" not in files["README.md"].read_text()


def test_each_trial_of_the_pareto_front_has_a_folder_of_its_own(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate)
    files = export_pareto(study, tmp_path / "out")
    front = study.pareto_front
    assert len(front) > 1
    points = json.loads(files["pareto.json"].read_text())["points"]
    assert [point["trial"] for point in points] == [best.trial for best in front]
    for best in front:
        folder = tmp_path / "out" / "pareto" / f"trial-{best.trial}"
        assert yaml.safe_load((folder / "best.yaml").read_text())["config"] == best.config.to_dict()
        sources = json.loads((folder / "provenance.json").read_text())["files"]
        assert {source["trial"] for source in sources.values()} == {best.trial}
        written = (folder / "ds_config.json").exists()
        assert written == (best.config.engine == "deepspeed")
        assert written or "cannot express this trial" in (folder / "README.md").read_text()
    assert export_pareto(study, tmp_path / "out") == files  # written anew


def test_a_file_that_cannot_express_the_winner_is_from_the_fastest_trial_that_it_can(
    tmp_path: Path, store: SqlStore
) -> None:
    def pytorch_is_faster(config: TrialConfig) -> Outcome:
        return measurement((2000.0 if config.engine == "pytorch" else 100.0) * config.micro_batch_size)

    search = {"engine": ["deepspeed", "pytorch"], "zero_stage": [0, 3], "micro_batch_size": [1, 2]}
    study = finished_study(tmp_path, store, pytorch_is_faster, search=search, cluster=GPUS)
    files = export_best(study, tmp_path / "out")
    winner, of_deepspeed = study.best(), study.best_among(r for r in study.results if r.config.engine == "deepspeed")
    assert winner is not None
    assert of_deepspeed is not None
    assert winner.config.engine == "pytorch"
    sources = json.loads(files["provenance.json"].read_text())["files"]
    trials = {name: source["trial"] for name, source in sources.items()}
    assert trials == {
        "best.yaml": winner.trial,
        "training_args.yaml": winner.trial,
        "accelerate.yaml": winner.trial,
        "ds_config.hf.json": of_deepspeed.trial,
        "ds_config.json": of_deepspeed.trial,
    }
    assert json.loads(files["ds_config.json"].read_text()) == to_deepspeed(of_deepspeed.config, study.space.workload)
    assert "deepspeed" not in yaml.safe_load(files["training_args.yaml"].read_text())
    readme = files["README.md"].read_text()
    assert readme.count("It cannot express the winner (DeepSpeed does not run engine pytorch)") == 2
    # The arguments that its `auto`s stand for are in no other file.
    assert "`per_device_train_batch_size=2, gradient_accumulation_steps=4," in readme


def test_without_a_deepspeed_trial_there_is_no_deepspeed_file(tmp_path: Path, store: SqlStore) -> None:
    search = {"engine": "pytorch", "zero_stage": [0, 3], "micro_batch_size": [1, 2]}
    study = finished_study(tmp_path, store, simulate, search=search, baseline=..., cluster=GPUS)
    files = export_best(study, tmp_path / "out")
    common = {"best.yaml", "launch.sh", "provenance.json", "README.md"}
    assert set(files) == common | {"training_args.yaml", "accelerate.yaml"}
    assert "ds_config" not in files["launch.sh"].read_text()


def test_what_nothing_can_express_has_only_the_files_of_autotune(tmp_path: Path, store: SqlStore) -> None:
    search = {"engine": "pytorch", "zero_stage": 3, "micro_batch_size": [1, 2]}
    study = finished_study(tmp_path, store, simulate, search=search, baseline=...)
    files = export_best(study, tmp_path / "out")
    assert set(files) == {"best.yaml", "provenance.json", "README.md"}
    assert (
        "There is no `training_args.yaml`: it can express no trial (accelerate shards" in files["README.md"].read_text()
    )
    with pytest.raises(UsageError, match=r"training-args cannot express trial \d+.*on GPUs alone"):
        export_files(study, "training-args")


def test_each_format_alone(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate)
    folder = {name: path.read_text() for name, path in export_best(study, tmp_path / "out").items()}
    only_read = Study(study.space, store, store.trials("sample"))
    names = {
        "best": {"best.yaml"},
        "training-args": {"training_args.yaml"},
        "deepspeed-hf": {"ds_config.hf.json"},
        "deepspeed": {"ds_config.json"},
        "accelerate": {"accelerate.yaml", "ds_config.json"},  # the one names the other
    }
    assert set(names) | {"train-script", "script", "adapter", "quantization"} == {"best", *FORMATS}
    for fmt, expected in names.items():
        assert export_files(only_read, fmt) == {name: folder[name] for name in expected}
    with pytest.raises(UsageError, match="study 'sample' ran no script"):
        export_files(only_read, "script")


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_command_of_a_script_of_ones_own(tmp_path: Path, store: SqlStore, nodes: int) -> None:
    script = {
        "command": "python 'my train.py' {training_args} --batch={micro_batch_size} --name={name} --to {output}",
        "environment": {"WHERE": "{node_rank} of {nodes}"},
        "launch": "rank" if nodes == 1 else "node",
    }
    (tmp_path / "my train.py").write_text("")
    search = {"engine": "pytorch", "zero_stage": 3, "micro_batch_size": 2, "activation_checkpointing": "none"}
    study = finished_study(
        tmp_path,
        store,
        simulate,
        script=script,
        cluster={**GPUS, "nodes": nodes},
        search={**search, "script": {"name": "it's $HOME"}},
        baseline=...,
    )
    files = export_best(study, tmp_path / "out")
    assert set(files) == {"best.yaml", "training_args.yaml", "launch.sh", "provenance.json", "README.md"}
    arguments = yaml.safe_load(files["training_args.yaml"].read_text())
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (2, 4 // nodes)
    assert export_files(study, "script") == {"launch.sh": files["launch.sh"].read_text()}
    # Commands that only say what they were given stand for the real ones.
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("torchrun", "python"):
        (programs / name).write_text('#!/bin/sh\nprintf "%s\\n" "$WHERE" "$(basename "$0")" "$@"\n')
        (programs / name).chmod(0o755)
    where = {"PATH": f"{programs}:/usr/bin:/bin", "NODE_RANK": "1", "MASTER_ADDR": "first"}
    ran = subprocess.run([files["launch.sh"], "--more"], env=where, capture_output=True, text=True, check=True)
    by_hand = [*["--standalone", "--nproc-per-node", "2", "--no-python"], "python"] if nodes == 1 else []
    assert ran.stdout.splitlines() == [
        f"{nodes - 1} of {nodes}",
        "torchrun" if nodes == 1 else "python",
        *by_hand,
        "my train.py",
        str(files["training_args.yaml"]),
        "--batch=2",
        "--name=it's $HOME",
        "--to",
        "output",
        "--more",
    ]


def test_adapters_are_a_file_of_their_own(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate, method="lora", lora={"rank": 8, "target_modules": "attention"})
    files = export_best(study, tmp_path / "out")
    read = LoraConfig.from_pretrained(str(files["adapter_config.json"].parent))
    assert (read.r, read.lora_alpha, read.target_modules) == (8, 32, {"q_proj", "k_proj", "v_proj", "o_proj"})
    readme = files["README.md"].read_text()
    assert readme.count("model.add_adapter(peft.LoraConfig(task_type='CAUSAL_LM', r=8, lora_alpha=32") == 4
    assert "`dtype=torch.bfloat16`" in readme
    assert export_files(study, "adapter") == {"adapter_config.json": files["adapter_config.json"].read_text()}


def test_weights_in_4_bits_are_described(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate, method="qlora", baseline=...)
    files = export_best(study, tmp_path / "out")
    read = BitsAndBytesConfig(**json.loads(files["quantization_config.json"].read_text()))
    assert (read.bnb_4bit_quant_type, read.bnb_4bit_use_double_quant) == ("nf4", True)
    assert read.bnb_4bit_compute_dtype == torch.bfloat16
    assert "adapter_config.json" in files
    assert "quantization_config=BitsAndBytesConfig(load_in_4bit=True" in files["README.md"].read_text()


def test_numerics_are_labelled(tmp_path: Path, store: SqlStore) -> None:
    search = {
        "engine": "pytorch",
        "zero_stage": 0,
        "micro_batch_size": [1, 2],
        "numerics": {"method": ["full", "lora"]},
    }
    study = finished_study(tmp_path, store, simulate, search=search, baseline=...)
    readme = export_best(study, tmp_path / "out")["README.md"].read_text()
    assert "The search varied what is trained, not only how fast: method (here `full`)." in readme


def test_states_on_a_disk_are_exported_with_the_folder_of_the_space(
    tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.space.nvme.async_io_error", lambda: None)
    search = {"engine": "deepspeed", "zero_stage": 3, "offload": "optimizer_nvme", "micro_batch_size": 1}
    study = finished_study(tmp_path, store, simulate, search=search, baseline=..., nvme={"path": "/local_nvme"})
    files = export_best(study, tmp_path / "out")
    written = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True}
    for name in ("ds_config.json", "ds_config.hf.json"):
        assert json.loads(files[name].read_text())["zero_optimization"]["offload_optimizer"] == written
    arguments = yaml.safe_load(files["training_args.yaml"].read_text())
    assert arguments["deepspeed"]["zero_optimization"]["offload_optimizer"] == written
    assert (
        "Optimizer states live in files below `/local_nvme`, up to 16.0 MiB on each node"
        in files["README.md"].read_text()
    )


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_layers_on_the_gpus_of_one_process_need_no_launcher(
    tmp_path: Path, store: SqlStore, launch: Callable[..., "subprocess.CompletedProcess[str]"], method: str
) -> None:
    search = {"engine": "pytorch", "zero_stage": 0, "micro_batch_size": 2, "device_map": "auto"}
    study = finished_study(tmp_path, store, simulate, method=method, cluster=GPUS, search=search, baseline=...)
    files = export_best(study, tmp_path / "out")
    readme, script = files["README.md"].read_text(), files["launch.sh"]
    assert "`python train.py training_args.yaml`" in readme
    assert readme.count('and `device_map="auto"`') == 2  # for the Trainer and for accelerate
    assert "local_rank" not in readme
    assert "`CUDA_VISIBLE_DEVICES=0,1`" in readme
    assert "one process on 2 GPUs, the only ones that it may see" in script.read_text()
    here = script.parent
    started = launch(script, "trainer", "train.py", "--mine").stdout.splitlines()
    assert started == ["python", "train.py", f"{here}/training_args.yaml", "--mine"]
    accelerate = yaml.safe_load(files["accelerate.yaml"].read_text())
    assert (accelerate["num_processes"], accelerate["distributed_type"]) == (1, "NO")
    arguments = yaml.safe_load(files["training_args.yaml"].read_text())
    batch = study.space.workload.global_batch_size
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == batch
    if method == "lora":
        assert "--nproc-per-node 1 train.py" in export_files(study, "train-script")["train.py"]


def test_full_training_has_no_adapters(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate)
    assert "adapter_config.json" not in export_best(study, tmp_path / "out")
    with pytest.raises(UsageError, match=r"adapter cannot express trial \d+.*it describes method lora or qlora"):
        export_files(study, "adapter")


def test_a_format_is_refused_not_approximated(tmp_path: Path, store: SqlStore) -> None:
    search = {"engine": ["deepspeed", "pytorch"], "zero_stage": 0, "micro_batch_size": [1, 2]}
    study = finished_study(
        tmp_path, store, lambda c: measurement(2.0 if c.engine == "pytorch" else 1.0), search=search, baseline=...
    )
    for fmt in ("deepspeed", "deepspeed-hf"):
        with pytest.raises(UsageError, match=rf"format {fmt} cannot express .*DeepSpeed does not run engine pytorch"):
            export_files(study, fmt)
    with pytest.raises(UsageError, match="mpirun"):
        export_files(study, "accelerate")
    with pytest.raises(UsageError, match="'axolotl' does not exist; use one of best, training-args"):
        export_files(study, "axolotl")


def test_the_same_study_gives_the_same_bytes_and_replaces_the_old_folder(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate)
    first = {name: path.read_bytes() for name, path in export_best(study, tmp_path / "out").items()}
    (tmp_path / "out" / "best" / "stale.json").write_text("{}")
    second = {name: path.read_bytes() for name, path in export_best(study, tmp_path / "out").items()}
    assert first == second
    assert {path.name for path in (tmp_path / "out" / "best").iterdir()} == set(second)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["best"]


def test_nothing_is_written_without_an_eligible_trial(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, lambda _: failure())
    assert export_best(study, tmp_path / "out") == {}
    assert not (tmp_path / "out").exists()
    with pytest.raises(NothingFeasibleError, match="no eligible trial"):
        export_files(study, "best")


def test_a_folder_that_cannot_be_written(tmp_path: Path, store: SqlStore) -> None:
    study = finished_study(tmp_path, store, simulate)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="--out"):
        export_best(study, tmp_path / "out")


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs a launch script with launchers that print how they were called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("torchrun", "accelerate", "python"):
        (tools / name).write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@"\n')
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(shutil.which('bash') or '/bin/bash').parent}:/usr/bin:/bin"

    def run(*command: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(part) for part in command], env={"PATH": path, **environment}, capture_output=True, text=True
        )

    return run


def test_the_launch_script_starts_the_measured_number_of_ranks(
    tmp_path: Path, store: SqlStore, launch: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    script = export_best(finished_study(tmp_path, store, simulate), tmp_path / "out")["launch.sh"]
    script = script.parent.rename(tmp_path / "moved away") / "launch.sh"
    here = script.parent
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2", "train.py"]
    for mode, command in (
        ("trainer", [*torchrun, f"{here}/training_args.yaml", "--mine", "a b"]),
        ("deepspeed", [*torchrun, "--mine", "a b", "--deepspeed", "--deepspeed_config", f"{here}/ds_config.json"]),
        (
            "accelerate",
            [
                *("accelerate", "launch", "--config_file", f"{here}/accelerate.yaml"),
                *("--deepspeed_config_file", f"{here}/ds_config.json", "--main_process_port", "0"),
                *("train.py", "--mine", "a b"),
            ],
        ),
    ):
        assert launch(script, mode, "train.py", "--mine", "a b").stdout.splitlines() == command
    for wrong in ([], ["trainer"], ["train.py", "--mine"]):
        ran = launch(script, *wrong)
        assert ran.returncode == 2
        assert "trainer|deepspeed|accelerate train.py" in ran.stderr


def test_on_several_nodes_the_launch_script_asks_which_one_this_is(
    tmp_path: Path, store: SqlStore, launch: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    cluster, workload = {**GPUS, "nodes": 2}, {"global_batch_size": 32, "sequence_length": 64}
    study = finished_study(tmp_path, store, simulate, cluster=cluster, workload=workload)
    script = export_best(study, tmp_path / "out")["launch.sh"]
    for mode in ("trainer", "deepspeed", "accelerate"):
        assert "NODE_RANK" in launch(script, mode, "train.py").stderr
        command = launch(script, mode, "train.py", NODE_RANK="1", MASTER_ADDR="10.0.0.1").stdout
        assert "10.0.0.1\n" in command
        assert "\n1\n" in command
    assert yaml.safe_load((script.parent / "accelerate.yaml").read_text())["num_machines"] == 2
