import pickle

import pytest

from autotune.errors import UnknownHardwareError, UsageError
from autotune.spec.cluster import GPUS, ClusterSpec, find_gpu, identify_gpu
from autotune.units import GIB, MIB


def test_every_entry_is_plausible_and_names_its_source() -> None:
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert gpu.source
        if gpu.device == "cpu":
            continue
        label_bytes = int(name.rsplit("-", 1)[1].removesuffix("GB")) * GIB
        assert gpu.memory_bytes is not None
        assert 0.9 * label_bytes < gpu.memory_bytes <= label_bytes, name
        assert {"bf16", "fp16", "fp32"} <= set(gpu.peak_flops_per_second)
        assert gpu.peak_flops_per_second["bf16"] == gpu.peak_flops_per_second["fp16"] > 0
        if "fp8" in gpu.peak_flops_per_second:
            ratio = gpu.peak_flops_per_second["fp8"] / gpu.peak_flops_per_second["bf16"]
            assert ratio == pytest.approx(2, rel=0.02), f"{name}: a sparse figure among dense ones?"
        assert gpu.memory_bandwidth_bytes_per_second is not None
        assert gpu.intra_node_bandwidth_bytes_per_second is not None
        assert gpu.inter_node_bandwidth_bytes_per_second is not None
        assert (
            gpu.memory_bandwidth_bytes_per_second
            > gpu.intra_node_bandwidth_bytes_per_second
            > gpu.inter_node_bandwidth_bytes_per_second
        )


def test_find_gpu_ignores_case() -> None:
    assert find_gpu("h100-80gb") is GPUS["H100-80GB"]
    assert find_gpu(" CPU ") is GPUS["cpu"]


def test_unknown_gpu_lists_the_known() -> None:
    with pytest.raises(UnknownHardwareError, match=r"'H100'.*A100-40GB.*H100-80GB.*cpu") as caught:
        find_gpu("H100")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device_name", "memory_gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", 79.65, "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.56, "A100-40GB"),
        ("A100-SXM4-40GB", 39.59, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 79.25, "A100-80GB"),
        ("NVIDIA H200", 139.8, "H200-141GB"),
        ("NVIDIA B200", 178.36, "B200-180GB"),
        ("NVIDIA L40S", 44.53, "L40S-48GB"),
        ("NVIDIA GeForce RTX 4090", 23.64, "RTX-4090-24GB"),
        ("AMD Instinct MI300X", 191.98, "MI300X-192GB"),
        ("AMD Instinct MI300X OAM", 191.69, "MI300X-192GB"),
        # Not what the table describes.
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA H200 NVL", 139.8, None),
        ("NVIDIA GB200", 184.0, None),
        ("NVIDIA A100-PCIE-40GB", 39.4, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.75, None),
        ("NVIDIA A100-SXM4-80GB", 39.5, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA L40", 44.4, None),
        ("Tesla V100-SXM2-16GB", 15.8, None),
        ("", 1.0, None),
    ],
)
def test_identify_gpu(device_name: str, memory_gib: float, name: str | None) -> None:
    found = identify_gpu(device_name, int(memory_gib * GIB))
    assert (found.name if found else None) == name


def test_cluster_of_gpus() -> None:
    cluster = ClusterSpec(nodes=2, gpus_per_node=8, gpu=GPUS["H100-80GB"])
    assert cluster.total_gpus == 16
    assert cluster.device == "cuda"
    assert cluster.memory_bytes == GPUS["H100-80GB"].memory_bytes
    assert cluster.peak_flops_per_second("bf16") == pytest.approx(989.4e12)
    assert cluster.peak_flops_per_second("fp32") == pytest.approx(66.9e12)
    assert cluster.peak_flops_per_second("int4") is None
    assert cluster.describe() == "16 x H100-80GB (2 nodes)"
    assert ClusterSpec(nodes=1, gpus_per_node=8, gpu=GPUS["H100-80GB"]).describe() == "8 x H100-80GB (1 node)"
    assert ClusterSpec(nodes=1, gpus_per_node=1, gpu=GPUS["H100-80GB"], memory_bytes=GIB).memory_bytes == GIB


def test_cluster_of_cpus() -> None:
    cluster = ClusterSpec(nodes=1, gpus_per_node=2, gpu=GPUS["cpu"], memory_bytes=900 * MIB)
    assert cluster.device == "cpu"
    assert cluster.peak_flops_per_second("fp32") is None
    assert cluster.describe() == "2 x cpu (1 node)"
    with pytest.raises(UsageError, match="found no memory_bytes for cpu"):
        ClusterSpec(nodes=1, gpus_per_node=2, gpu=GPUS["cpu"])


@pytest.mark.parametrize(
    ("nodes", "gpus_per_node", "memory_bytes", "key"),
    [(0, 8, GIB, "nodes"), (1, 0, GIB, "gpus_per_node"), (1, -1, GIB, "gpus_per_node"), (1, 1, -1, "memory_bytes")],
)
def test_cluster_needs_at_least_one_of_each(nodes: int, gpus_per_node: int, memory_bytes: int, key: str) -> None:
    with pytest.raises(UsageError, match=f"found {key} "):
        ClusterSpec(nodes=nodes, gpus_per_node=gpus_per_node, gpu=GPUS["cpu"], memory_bytes=memory_bytes)


def test_cluster_is_a_value_that_travels() -> None:
    cluster = ClusterSpec(nodes=1, gpus_per_node=8, gpu=GPUS["H100-80GB"])
    assert pickle.loads(pickle.dumps(cluster)) == cluster
    assert hash(pickle.loads(pickle.dumps(cluster))) == hash(cluster)
