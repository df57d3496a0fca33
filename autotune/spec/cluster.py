"""`GpuSpec` and `ClusterSpec`: the hardware. Every figure is the vendor's, and names where it stands."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from autotune.errors import UnknownHardwareError, UsageError, shown
from autotune.units import GIB

Device = Literal["cpu", "cuda"]
"""PyTorch's name of the device type; ROCm builds of PyTorch say `cuda` too."""

_TERA = 10**12
_GIGA = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One kind of accelerator."""

    name: str
    device: Device
    memory_bytes: int | None
    """What PyTorch reports as the device's total, not the label on the box: ECC and firmware take their share, and
    drivers differ by up to 0.5 %, so this is the smallest total found in published PyTorch out-of-memory messages ("has
    a total capacity of …"). None: the cluster has to say."""
    peak_flops_per_second: dict[str, float] = field(hash=False)
    """Dense (not 2:4 sparse) peak by precision of the matrix multiplication, accumulated in fp32. `fp32` is true fp32
    without TF32, because that is what PyTorch runs unless it is told otherwise. No key: the hardware lacks it."""
    memory_bandwidth_bytes_per_second: float | None
    intra_node_bandwidth_bytes_per_second: float | None
    """Per GPU, in one direction, to the other GPUs of its node."""
    inter_node_bandwidth_bytes_per_second: float | None
    """Per GPU, in one direction: its share of the node's network cards. An assumption, named in `source`."""
    source: str


_GPU_LIST = (
    GpuSpec(
        name="A100-40GB",
        device="cuda",
        memory_bytes=int(39.38 * GIB),
        peak_flops_per_second={"bf16": 312 * _TERA, "fp16": 312 * _TERA, "fp32": 19.5 * _TERA},
        memory_bandwidth_bytes_per_second=1555 * _GIGA,
        intra_node_bandwidth_bytes_per_second=300 * _GIGA,
        inter_node_bandwidth_bytes_per_second=25 * _GIGA,
        source="NVIDIA A100 Tensor Core GPU datasheet, 2020, SXM4 40GB (NVLink 600 GB/s is both directions);"
        " network assumed as in DGX A100, 8 x 200 Gb/s for 8 GPUs",
    ),
    GpuSpec(
        name="A100-80GB",
        device="cuda",
        memory_bytes=int(79.14 * GIB),
        peak_flops_per_second={"bf16": 312 * _TERA, "fp16": 312 * _TERA, "fp32": 19.5 * _TERA},
        memory_bandwidth_bytes_per_second=2039 * _GIGA,
        intra_node_bandwidth_bytes_per_second=300 * _GIGA,
        inter_node_bandwidth_bytes_per_second=25 * _GIGA,
        source="NVIDIA A100 Tensor Core GPU datasheet, 2021, SXM4 80GB (NVLink 600 GB/s is both directions);"
        " network assumed as in DGX A100, 8 x 200 Gb/s for 8 GPUs",
    ),
    GpuSpec(
        name="H100-80GB",
        device="cuda",
        memory_bytes=int(79.10 * GIB),
        peak_flops_per_second={
            "bf16": 989.4 * _TERA, "fp16": 989.4 * _TERA, "fp32": 66.9 * _TERA, "fp8": 1978.9 * _TERA,
        },
        memory_bandwidth_bytes_per_second=3352 * _GIGA,
        intra_node_bandwidth_bytes_per_second=450 * _GIGA,
        inter_node_bandwidth_bytes_per_second=50 * _GIGA,
        source="NVIDIA H100 Tensor Core GPU Architecture whitepaper, 2023, H100 SXM5, dense columns (NVLink 900 GB/s is"
        " both directions); network assumed as in DGX H100, 8 x 400 Gb/s for 8 GPUs",
    ),
    GpuSpec(
        name="H200-141GB",
        device="cuda",
        memory_bytes=int(139.72 * GIB),
        peak_flops_per_second={
            "bf16": 989.4 * _TERA, "fp16": 989.4 * _TERA, "fp32": 66.9 * _TERA, "fp8": 1978.9 * _TERA,
        },
        memory_bandwidth_bytes_per_second=4800 * _GIGA,
        intra_node_bandwidth_bytes_per_second=450 * _GIGA,
        inter_node_bandwidth_bytes_per_second=50 * _GIGA,
        source="NVIDIA H200 Tensor Core GPU datasheet, 2024, SXM (its compute is that of H100 SXM5, whose whitepaper"
        " has the dense digits); network assumed as in DGX H200, 8 x 400 Gb/s for 8 GPUs",
    ),
    GpuSpec(
        name="H20-96GB",
        device="cuda",
        memory_bytes=int(95.22 * GIB),
        peak_flops_per_second={
            "bf16": 148 * _TERA, "fp16": 148 * _TERA, "fp32": 44 * _TERA, "fp8": 296 * _TERA,
        },
        memory_bandwidth_bytes_per_second=4000 * _GIGA,
        intra_node_bandwidth_bytes_per_second=450 * _GIGA,
        inter_node_bandwidth_bytes_per_second=50 * _GIGA,
        source="NVIDIA H20 product brief, 2023, dense columns (NVLink 900 GB/s is both directions); network assumed as"
        " in HGX H20, 8 x 400 Gb/s for 8 GPUs",
    ),
    GpuSpec(
        name="B200-180GB",
        device="cuda",
        memory_bytes=int(178.35 * GIB),
        peak_flops_per_second={
            "bf16": 2250 * _TERA, "fp16": 2250 * _TERA, "fp32": 75 * _TERA, "fp8": 4500 * _TERA,
        },
        memory_bandwidth_bytes_per_second=8000 * _GIGA,
        intra_node_bandwidth_bytes_per_second=900 * _GIGA,
        inter_node_bandwidth_bytes_per_second=50 * _GIGA,
        source="NVIDIA DGX B200 datasheet, 2024, divided by its 8 GPUs (1,440 GB, 64 TB/s, 72 PFLOPS of sparse FP8,"
        " NVLink 14.4 TB/s in both directions), bf16 as half of FP8, and NVIDIA HGX platform page, 2025, for FP32 (600"
        " TFLOPS for 8); network assumed as in DGX B200, 8 x 400 Gb/s for 8 GPUs",
    ),
    GpuSpec(
        name="L40S-48GB",
        device="cuda",
        memory_bytes=int(44.39 * GIB),
        peak_flops_per_second={
            "bf16": 362.05 * _TERA, "fp16": 362.05 * _TERA, "fp32": 91.6 * _TERA, "fp8": 733 * _TERA,
        },
        memory_bandwidth_bytes_per_second=864 * _GIGA,
        intra_node_bandwidth_bytes_per_second=32 * _GIGA,
        inter_node_bandwidth_bytes_per_second=12.5 * _GIGA,
        source="NVIDIA L40S datasheet, 2023, dense columns (PCIe Gen4 x16, 64 GB/s is both directions);"
        " network assumed 100 Gb/s a GPU, as four GPUs behind two 200 Gb/s cards",
    ),
    GpuSpec(
        name="RTX-4090-24GB",
        device="cuda",
        memory_bytes=int(23.52 * GIB),
        peak_flops_per_second={
            "bf16": 165.2 * _TERA, "fp16": 165.2 * _TERA, "fp32": 82.6 * _TERA, "fp8": 330.3 * _TERA,
        },
        memory_bandwidth_bytes_per_second=1008 * _GIGA,
        intra_node_bandwidth_bytes_per_second=32 * _GIGA,
        inter_node_bandwidth_bytes_per_second=3.125 * _GIGA,
        source="NVIDIA Ada GPU Architecture whitepaper, 2022, RTX 4090, dense, fp32 accumulation (PCIe Gen4 x16; the"
        " driver copies between GPUs through host memory, so less is measured); network assumed 25 Gb/s a GPU",
    ),
    GpuSpec(
        name="MI300X-192GB",
        device="cuda",
        memory_bytes=int(191.69 * GIB),
        peak_flops_per_second={
            "bf16": 1307.4 * _TERA, "fp16": 1307.4 * _TERA, "fp32": 163.4 * _TERA, "fp8": 2614.9 * _TERA,
        },
        memory_bandwidth_bytes_per_second=5300 * _GIGA,
        intra_node_bandwidth_bytes_per_second=448 * _GIGA,
        inter_node_bandwidth_bytes_per_second=50 * _GIGA,
        source="AMD Instinct MI300X data sheet, 2023, and MI300X Platform data sheet, 2023 (7 Infinity Fabric links of"
        " 128 GB/s in both directions, so 64 GB/s to any one peer); network assumed 8 x 400 Gb/s for 8 GPUs",
    ),
    GpuSpec(
        name="cpu",
        device="cpu",
        memory_bytes=None,
        peak_flops_per_second={},
        memory_bandwidth_bytes_per_second=None,
        intra_node_bandwidth_bytes_per_second=None,
        inter_node_bandwidth_bytes_per_second=None,
        source="no figures: processors differ too much, so a CPU study reports no utilization",
    ),
)  # fmt: skip

GPUS: dict[str, GpuSpec] = {gpu.name: gpu for gpu in _GPU_LIST}

# What `torch.cuda.get_device_name` says. Only the form that the table describes: a PCIe A100 or H100 and an H100 NVL
# have other bandwidths or clocks, a MIG slice or a laptop part is another device: a wrong figure is worse than none.
_DEVICE_NAMES = {
    r"(NVIDIA )?A100-SXM4?-40GB": "A100-40GB",
    r"(NVIDIA )?A100-SXM4?-80GB": "A100-80GB",
    r"NVIDIA H100 80GB HBM3": "H100-80GB",
    r"NVIDIA H200": "H200-141GB",
    r"NVIDIA H20": "H20-96GB",
    r"NVIDIA B200": "B200-180GB",
    r"NVIDIA L40S": "L40S-48GB",
    r"NVIDIA GeForce RTX 4090": "RTX-4090-24GB",
    r"AMD Instinct MI300X( OAM| VF| HF)?": "MI300X-192GB",
}

_MEMORY_TOLERANCE = 0.05
"""A ratio: drivers report totals that differ by less than 1 %; a partition of a device has at most half of it."""


def find_gpu(name: str) -> GpuSpec:
    """Look a GPU up by its name in the table, whatever the case.

    Raises:
        UnknownHardwareError: the table has no such name.
    """
    for gpu in GPUS.values():
        if gpu.name.lower() == name.strip().lower():
            return gpu
    raise UnknownHardwareError(f"GPU {shown(name)} is not in the table of known hardware; use one of {', '.join(GPUS)}")


def identify_gpu(device_name: str, memory_bytes: int) -> GpuSpec | None:
    """Find the GPU that PyTorch calls `device_name`.

    Args:
        device_name: as `torch.cuda.get_device_name` returns it.
        memory_bytes: total bytes of the device, which tell a whole device from a partition of one.

    Returns:
        None where the table does not describe exactly this device.
    """
    for pattern, name in _DEVICE_NAMES.items():
        gpu = GPUS[name]
        if re.fullmatch(pattern, device_name.strip(), re.IGNORECASE) and gpu.memory_bytes is not None:
            fits = abs(memory_bytes / gpu.memory_bytes - 1) <= _MEMORY_TOLERANCE
            return gpu if fits else None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeSpec:
    """The fast disk of each node, for what is offloaded there."""

    path: str
    """A folder on it, the same on each node; a trial makes one of its own in it."""
    free_bytes: int | None = None
    """Of one node's; None: not known before a trial looks."""
    bandwidth_bytes_per_second: float = 3 * _GIGA
    """Of one node's, reading and writing in turns. The default is about one data-centre drive on 4 lanes of PCIe
    generation 4, whose datasheets say 7 GB/s of reading and 4 of writing. Judgement: state your disks'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Equal nodes with equal GPUs."""

    nodes: int
    gpus_per_node: int
    """GPUs of a node; workers of a node where `gpu` is `cpu`."""
    gpu: GpuSpec
    memory_bytes: int = 0
    """Per device. Left out, it is the GPU's own; a CPU has none, so there it must be given."""
    nvme: NvmeSpec | None = None
    """None: nothing is offloaded to a disk."""

    def __post_init__(self) -> None:
        if not self.memory_bytes and self.gpu.memory_bytes is None:
            raise UsageError(
                f"cluster: found no memory_bytes for {self.gpu.name}, but its trials need a limit;"
                " set for example memory_bytes: 4GiB"
            )
        object.__setattr__(self, "memory_bytes", self.memory_bytes or self.gpu.memory_bytes)
        for key in ("nodes", "gpus_per_node", "memory_bytes"):
            if getattr(self, key) < 1:
                raise UsageError(f"cluster: found {key} {getattr(self, key)}, but it must be at least 1; correct {key}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "gpu": self.gpu.name,
            "memory_bytes": self.memory_bytes,
            **({} if self.nvme is None else {"nvme": dataclasses.asdict(self.nvme)}),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            UnknownHardwareError: the table has no such GPU.
        """
        nvme = NvmeSpec(**fields["nvme"]) if "nvme" in fields else None
        return cls(**{**fields, "gpu": find_gpu(fields["gpu"]), "nvme": nvme})

    @property
    def total_gpus(self) -> int:
        """GPUs of all nodes together."""
        return self.nodes * self.gpus_per_node

    @property
    def nvme_path(self) -> str | None:
        """The folder of `nvme`."""
        return None if self.nvme is None else self.nvme.path

    @property
    def device(self) -> Device:
        """PyTorch's device type."""
        return self.gpu.device

    def peak_flops_per_second(self, precision: str) -> float | None:
        """Dense peak of one GPU; None where the hardware lacks the precision or its peak is unknown."""
        return self.gpu.peak_flops_per_second.get(precision)

    def describe(self) -> str:
        """One short line for people: `8 x H100-80GB (1 node)`."""
        return f"{self.total_gpus} x {self.gpu.name} ({self.nodes} node{'s' if self.nodes > 1 else ''})"
