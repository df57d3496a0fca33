"""Memory of a training config without a device: from the traced step of its structure to `MemoryPrediction`.

A structure is all of a config that shapes the step: the engine, its settings, the number of ranks. Batch and length
only scale it, and so does depth where layers repeat. A structure is traced once, in a few seconds, and kept on disk.

What is predicted is exact for a CPU, where live tensors are the memory (`benchmarks/memory_cpu.py`). On a GPU it is a
hypothesis until measured there: kernels differ in what they save, and `CONTEXT` and `FRAGMENTATION` are estimates.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import autotune
from autotune.predict import device
from autotune.predict.stream import PipelineStream, RankStream, SitedStream, Stream, fragmentation_bytes
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import FLASH_ATTENTION, ZERO_QUANTIZED, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.nvme import swapping_bytes
from autotune.spec.prediction import MemoryPrediction, Part
from autotune.spec.workload import Workload

CPU_DEVIATION = 0.007
"""A ratio. The largest error over the demo space, 1.5 %, is then about where `predict.plan.SURE` begins."""
GPU_DEVIATION = 0.06
"""A ratio. No measurement stands behind it yet: it covers other kernels, and what a replay does not see of
fragmentation.
"""

COMPILED_DEVIATION = 0.2
"""A ratio, on GPUs: about as much as compiling saves (4 to 30 % of peaks on two gloo ranks, torch 2.13). What is traced
is what inductor makes for CPUs; for GPUs it may fuse otherwise, which has not been measured."""

_SOURCES = (
    "engines/*.py",
    "modeling/*.py",
    "formats/deepspeed_json.py",
    "formats/bitsandbytes_json.py",
    "formats/peft_json.py",
    "predict/allocator.py",
    "predict/compiled.py",
    "predict/fake.py",
    "predict/fake_mode.py",
    "predict/flex.py",
    "predict/liger.py",
    "predict/record.py",
    "predict/reserved.py",
    "predict/segments.py",
    "predict/stream.py",
    "predict/structure.py",
    "predict/trace.py",
    "predict/zero.py",
)
_DEFAULT_WINDOWS = dict.fromkeys(("mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3_text"), 4096)
"""Positions, by model_type: the sliding window where a config names none. Source: transformers, configuration_*.py."""
_NARROW, _WIDE = 1, 2**30
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft")


def predict_memory(config: TrialConfig, model: ModelSpec, workload: Workload, cluster: ClusterSpec) -> MemoryPrediction:
    """Peaks of the fullest rank of a trial, or GPU of its only rank.

    Raises:
        ValueError: the global batch does not divide.
        UsageError: the engine refuses the config.
    """
    steps = workload.gradient_accumulation_steps(config)
    rows, tokens = workload.largest_shape(config)
    batch, length = np.array([rows]), np.array([tokens])
    streams = rank_streams(model, config, accumulates=steps > 1, batches=steps)
    fullest = max(streams, key=lambda stream: float(stream.peak_bytes(batch, length, cluster.device)[0]))
    parts = fullest.breakdown(rows, tokens, cluster.device)
    if cluster.device == "cpu":
        peak = sum(parts.values())
        return MemoryPrediction(
            allocated_bytes=peak,
            reserved_bytes=peak,
            device_used_bytes=peak,
            host_bytes=0,
            breakdown=parts,
            deviation=deviation(cluster, compiled=config.torch_compile),
        )
    host = parts.pop(Part.HOST, 0)
    if config.swaps:  # traces are of one sub-group, however deep the model is
        host = swapping_bytes(config, model)
    host *= min(config.gpus, cluster.gpus_per_node)
    allocated = sum(parts.values())
    unused = round(float(fragmentation_bytes(fullest, batch, length, cluster.device)[0]))
    if unused:
        parts[Part.FRAGMENTATION] = unused
    parts[Part.CONTEXT] = context_bytes(config, cluster)
    return MemoryPrediction(
        allocated_bytes=allocated,
        reserved_bytes=allocated + unused,
        device_used_bytes=sum(parts.values()),
        host_bytes=host,
        breakdown=parts,
        deviation=deviation(cluster, compiled=config.torch_compile),
        gpu=0 if isinstance(fullest, PipelineStream) else fullest.gpu,
        layers_of_gpus=() if isinstance(fullest, PipelineStream) else tuple(fullest.layers.tolist()),
    )


def rank_streams(model: ModelSpec, config: TrialConfig, *, accumulates: bool, batches: int = 0) -> list[RankStream]:
    """The streams of the ranks that may be the fullest."""
    names = structures(model, config, accumulates=accumulates, batches=batches)
    return streams_of(names, config, batches)


def streams_of(names: Sequence[str], config: TrialConfig, batches: int) -> list[RankStream]:
    """The streams of a config's `structures`, one for each rank."""
    found = [stream(name) for name in names]
    if config.pipeline_parallel_size == 1 or len(traced_batches(config, batches)) == 1:
        return [*found]
    low, high = traced_batches(config, batches)
    pairs = zip(found[::2], found[1::2], strict=True)
    return [PipelineStream(fewer, more, (batches - low) / (high - low)) for fewer, more in pairs]


def structures(model: ModelSpec, config: TrialConfig, *, accumulates: bool, batches: int = 0) -> tuple[str, ...]:
    """What has to be traced for a config: the first rank's structure, the last's where partitions are uneven, that of
    a rank of each stage of a pipeline that may be the fullest, of each GPU of one process that may be it.

    Configs with equal structures differ only in batch and length. Of a length it counts whether a sliding window is
    shorter.

    Args:
        model: the architecture.
        config: what runs.
        accumulates: an optimizer step has more than one micro-batch.
        batches: how many; they count where they go through a pipeline.
    """
    size = config.pipeline_parallel_size
    if size > 1:
        whole = replace(config, loss="full_logits")  # what the loss does is the last rank's
        return tuple(
            _structure(model, config if at == size - 1 else whole, True, at * config.gpus // size, traced)
            for at in _fullest(config, model.num_hidden_layers)
            for traced in traced_batches(config, batches)
        )
    if config.device_map == "auto":
        return tuple(_structure(model, config, accumulates, role) for role in roles(config.gpus))
    uneven = config.engine == "deepspeed" and config.zero_stage in (1, 2)
    ranks = {0, config.gpus - 1} if uneven else {0}
    return tuple(_structure(model, config, accumulates, rank) for rank in sorted(ranks))


def traced_batches(config: TrialConfig, batches: int) -> tuple[int, ...]:
    """How many micro-batches are traced of those that go through a pipeline: all, or two numbers for a line.

    Under `1f1b` a rank has at most as many micro-batches alive as there are ranks; with two stages a rank less than
    twice as many are, and they come in rounds of as many as there are ranks.
    """
    size = config.pipeline_parallel_size
    return (batches,) if batches <= 3 * size else (2 * size, 3 * size)


def layers_of_rank(config: TrialConfig, depth: int, rank: int) -> int:
    """Layers that a rank of a pipeline has, of all its stages."""
    stages = config.pipeline_stages
    mine = range(rank, stages, config.pipeline_parallel_size)
    return sum((stage + 1) * depth // stages - stage * depth // stages for stage in mine)


def _fullest(config: TrialConfig, depth: int) -> list[int]:
    """Ranks of a pipeline that may need most: the first, which embeds, the last, which has the loss, and of those
    between the first with each number of layers. The later a rank is, the fewer micro-batches live on it at a time;
    but with `zero_bubble` the more wait for their weights' gradients, so that any rank may be the fullest.
    """
    size = config.pipeline_parallel_size
    if config.pipeline_schedule == "zero_bubble":
        return list(range(size))
    between = {layers_of_rank(config, depth, rank): rank for rank in range(size - 2, 0, -1)}
    return sorted({0, *between.values(), size - 1})


def roles(gpus: int) -> tuple[int, ...]:
    """Of GPUs that share the layers in one process, those that may be the fullest, in a structure's place of ranks: 0
    the first, which embeds and gets the logits back, 1 that between with most layers, 2 the last, which has the loss.
    Which GPUs these are follows from the model, see `autotune.modeling.device_map`.
    """
    return (0, 1, 2) if gpus > 2 else (0, 2)


def is_traced(structure: str) -> bool:
    """Whether a structure is on disk already."""
    return _file(structure).exists()


def deviation(cluster: ClusterSpec, *, compiled: bool = False) -> float:
    """Standard deviation of a predicted peak, as a ratio of it."""
    traced = CPU_DEVIATION if cluster.device == "cpu" else GPU_DEVIATION
    return math.hypot(traced, COMPILED_DEVIATION) if compiled and cluster.device == "cuda" else traced


def context_bytes(config: TrialConfig, cluster: ClusterSpec) -> int:
    """What no tensor owns: the CUDA context, cuBLAS's workspace and a communicator; nothing on a CPU."""
    if cluster.device == "cpu":
        return 0
    gpu, ranks_on_node = cluster.gpu.name, min(config.gpus, cluster.gpus_per_node)
    size = device.CUDA_CONTEXT_BYTES + device.workspace_bytes(gpu)
    return size + (device.communicator_bytes(gpu, ranks_on_node) if config.ranks > 1 else 0)


def _structure(model: ModelSpec, config: TrialConfig, accumulates: bool, rank: int, batches: int = 0) -> str:
    """Everything that the traced step depends on, as JSON."""
    fields = config.to_dict()
    del fields["sequence_length"]
    fields.pop("script", None)  # what a user's script makes of its knobs is not known
    fields.pop("fp8", None)  # saves what it multiplies before the cast, as without
    for key in ZERO_QUANTIZED:  # by kernels for GPUs alone
        fields.pop(key, None)
    # A micro-batch of one sequence has layouts of its own, which make a difference of 0.2 % at most
    # (`benchmarks/memory_cpu.py`), and would double what has to be traced.
    fields["micro_batch_size"] = 2
    # Tensors of fp16 have the sizes of those of bf16; a loss scaler is a few bytes.
    fields["precision"] = "bf16" if config.precision == "fp16" else config.precision
    # All attend by a flash kernel, which saves its output and a logarithm for each position. So does FlexAttention, but
    # transformers may copy key heads for it.
    fields["attention"] = "sdpa" if config.attention in FLASH_ATTENTION else config.attention
    # A flash kernel is told where sequences begin, and has no mask; a sequence alone has none either.
    if config.attention in FLASH_ATTENTION or config.is_never_padded:
        fields.pop("batching", None)
    elif config.batching == "dynamic_padding":
        fields["batching"] = "padded"
    return json.dumps(
        {
            "model": {"name": model.name, "config": _with_window(model.config, config)},
            "config": fields,
            "accumulates": accumulates,
            "rank": rank,
            "versions": _versions() | {package: importlib.metadata.version(package) for package in _extras(config)},
            **({"batches": batches} if batches else {}),
        },
        sort_keys=True,
    )


def _extras(config: TrialConfig) -> list[str]:
    """Packages that a traced step runs besides."""
    asked = {
        "bitsandbytes": config.method == "qlora" or config.optimizer == "adamw_8bit",
        "torchao": config.optimizer == "adamw_torch_8bit",
    }
    return [package for package, is_asked in asked.items() if is_asked]


def _with_window(model: dict[str, Any], config: TrialConfig) -> dict[str, Any]:
    """The model's config with a sliding window that any traced length is to the same side of.

    With sdpa, transformers makes a mask only where a sequence is as long as the window (masking_utils.py,
    `_ignore_causal_mask_sdpa`), of the same size whatever the window. Eager attention always has a mask, a flash
    kernel never, and FlexAttention one that is not worth counting.
    """
    kind = str(model.get("model_type"))
    window = model.get("sliding_window", _DEFAULT_WINDOWS.get(kind))
    if not window or (kind.startswith("qwen") and not model.get("use_sliding_window")):
        return model
    masked = config.attention == "sdpa" and config.sequence_length >= window
    return model | {"sliding_window": _NARROW if masked else _WIDE}


@functools.cache
def _versions() -> dict[str, str]:
    """Of the libraries, and a digest of our own sources that decide on a trace: a version may change them and keep its
    number.
    """
    root = Path(autotune.__file__).parent
    sources = sorted(file for pattern in _SOURCES for file in root.glob(pattern))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    return {"autotune": digest, **{package: importlib.metadata.version(package) for package in _PACKAGES}}


@functools.lru_cache(maxsize=4096)
def stream(structure: str) -> Stream | SitedStream:
    """The stream of a structure: from memory, from disk, or traced.

    Raises:
        UsageError: the engine refuses the config.
    """
    file = _file(structure)
    try:
        with np.load(file, allow_pickle=False) as stored:
            return _from_arrays(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or cut off by a full disk
        pass
    from autotune.predict.trace import trace_stream  # torch, transformers and the engine: not for what is on disk

    fields: dict[str, Any] = json.loads(structure)
    config = TrialConfig.from_dict({**fields["config"], "sequence_length": 1})
    model = ModelSpec(**fields["model"])
    traced = trace_stream(
        model, config, accumulates=fields["accumulates"], rank=fields["rank"], batches=fields.get("batches", 0)
    )
    _keep(file, traced)
    return traced


def _file(structure: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "autotune" / "traces" / f"{hashlib.sha256(structure.encode()).hexdigest()[:32]}.npz"


def _keep(file: Path, stream: Stream | SitedStream) -> None:
    fresh = file.with_name(f".{file.name}.{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(fresh, **dict(_arrays(stream)))
        fresh.replace(file)
    except OSError:  # a home that cannot be written costs time, nothing else
        with contextlib.suppress(OSError):
            fresh.unlink()


def _arrays(stream: Stream | SitedStream) -> Iterable[tuple[str, Any]]:
    return ((name, getattr(stream, name)) for name in type(stream).__dataclass_fields__)


def _from_arrays(stored: Any) -> Stream | SitedStream:
    if "live" in stored:
        spread = int(stored["gpu"]), stored["layers"]
        return Stream(stored["live"], stored["fragmentation"], int(stored["pieces"]), *spread)
    arrays: dict[str, Any] = {name: stored[name] for name in SitedStream.__dataclass_fields__}
    scalars = {name: int(arrays[name]) for name in ("pieces", "gpu")}
    return SitedStream(**{**arrays, **scalars, "steps": float(arrays["steps"])})
