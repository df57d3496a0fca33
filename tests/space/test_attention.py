"""`attention`: each kernel where it can run and is installed, and dropped with the reason elsewhere."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autotune.space import attention
from tests.samples import sample_space

SEARCH: dict[str, Any] = {
    "engine": "pytorch",
    "zero_stage": 3,
    "attention": ["sdpa", "flash_attention_2", "flash_attention_3"],
}


def dropped(folder: Path, gpu: str, search: dict[str, Any] = SEARCH) -> dict[object, str]:
    memory = {"memory_bytes": "60MiB"} if gpu == "cpu" else {}
    cluster = {"nodes": 1, "gpus_per_node": 2, "gpu": gpu, **memory}
    space = sample_space(folder, cluster=cluster, search=search, baseline=...)
    return {item.value: item.reason for item in space.dropped}


@pytest.mark.parametrize(
    ("gpu", "reasons"),
    [
        ("cpu", {"flash_attention_2": "needs a GPU", "flash_attention_3": "needs a GPU"}),
        ("A100-80GB", {"flash_attention_3": "is for GPUs like H100, and A100-80GB is none"}),
        ("H100-80GB", {}),
    ],
)
def test_where_a_kernel_runs(tmp_path: Path, gpu: str, reasons: dict[str, str]) -> None:
    found = dropped(tmp_path, gpu)
    assert set(found) == set(reasons)
    assert all(reasons[str(value)] in reason for value, reason in found.items())


def test_there_is_no_kernel_for_fp32(tmp_path: Path) -> None:
    found = dropped(tmp_path, "H100-80GB", {**SEARCH, "precision": "fp32"})
    assert set(found) == {"flash_attention_2", "flash_attention_3"}


@pytest.mark.parametrize(
    ("here", "values"),
    [
        ((), {"flash_attention_2", "flash_attention_3"}),
        (("flash_attn",), {"flash_attention_3"}),
        (("kernels",), set()),  # transformers loads either from the hub
    ],
)
def test_what_is_not_installed_where_gpus_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: tuple[str, ...], values: set[str]
) -> None:
    found = importlib.util.find_spec
    packages = ("flash_attn", "flash_attn_interface", "kernels")

    def find(name: str) -> object:
        return (name in here or None) if name in packages else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert dropped(tmp_path, "H100-80GB") == {}  # planned on a machine without GPUs
    monkeypatch.setattr(attention, "DRIVER", tmp_path)
    reasons = dropped(tmp_path, "H100-80GB")
    assert set(reasons) == values
    assert all("which is not installed" in reason for reason in reasons.values())
