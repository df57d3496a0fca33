"""`predict_memory`: what it adds up, what is on disk, and which configs share a trace."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.predict import memory
from autotune.predict.memory import context_bytes, is_traced, predict_memory, rank_streams, structures
from autotune.predict.segments import PARTS, QUANTITIES
from autotune.predict.stream import REPLAYED_TOKENS, SitedStream, Stream
from autotune.predict.trace import record_trace
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.prediction import Part
from autotune.spec.workload import Workload
from autotune.units import GIB, MIB
from tests.predict.test_fake import TINY

CPU = ClusterSpec(nodes=1, gpus_per_node=2, gpu=find_gpu("cpu"), memory_bytes=GIB)
H100 = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
ACCUMULATING = Workload(global_batch_size=64)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory.stream.cache_clear()
    yield tmp_path
    memory.stream.cache_clear()


def a_config(**changes: Any) -> TrialConfig:
    fields: dict[str, Any] = {
        "engine": "pytorch",
        "gpus": 2,
        "zero_stage": 0,
        "activation_checkpointing": "none",
        "micro_batch_size": 2,
        "sequence_length": 64,
    }
    return TrialConfig(**fields | changes)


def keep(config: TrialConfig, parts: dict[Part, int], **fields: Any) -> None:
    """Put a stream of one moment on disk, as if the config had been traced."""
    live = np.zeros((1, len(PARTS), QUANTITIES))
    live[0, :, 0] = [parts.get(part, 0) for part in PARTS]
    for name in structures(TINY, config, accumulates=True):
        memory._keep(memory._file(name), Stream(live, **fields))


SOME = {Part.PARAMETERS: 4 * GIB, Part.ACTIVATIONS: 2 * GIB, Part.HOST: 3 * GIB}


def test_on_a_cpu_the_host_is_the_device_and_nothing_is_reserved() -> None:
    keep(a_config(), SOME, fragmentation=np.full(len(REPLAYED_TOKENS), float(GIB)))
    predicted = predict_memory(a_config(), TINY, ACCUMULATING, CPU)
    assert predicted.breakdown == SOME
    assert predicted.allocated_bytes == predicted.reserved_bytes == predicted.device_used_bytes == 9 * GIB
    assert predicted.host_bytes == 0
    assert context_bytes(a_config(), CPU) == 0


def test_on_a_gpu_the_parts_add_up_to_what_is_used() -> None:
    keep(a_config(), SOME, fragmentation=np.full(len(REPLAYED_TOKENS), float(GIB)))
    predicted = predict_memory(a_config(), TINY, ACCUMULATING, H100)
    assert sum(predicted.breakdown.values()) == predicted.device_used_bytes
    assert predicted.allocated_bytes == 6 * GIB
    assert predicted.reserved_bytes == 7 * GIB
    assert predicted.device_used_bytes == 7 * GIB + context_bytes(a_config(), H100)
    assert predicted.breakdown[Part.FRAGMENTATION] == GIB
    assert predicted.breakdown[Part.CONTEXT] == context_bytes(a_config(), H100) > 512 * MIB
    assert Part.HOST not in predicted.breakdown


@pytest.mark.parametrize(("gpus", "nodes", "ranks"), [(2, 1, 2), (8, 1, 8), (16, 2, 8)])
def test_host_bytes_are_of_all_ranks_of_a_node(gpus: int, nodes: int, ranks: int) -> None:
    config = a_config(gpus=gpus)
    keep(config, SOME)
    assert predict_memory(config, TINY, ACCUMULATING, replace(H100, nodes=nodes)).host_bytes == ranks * 3 * GIB


def test_a_single_rank_needs_no_communicator() -> None:
    assert context_bytes(a_config(gpus=1), H100) < context_bytes(a_config(gpus=2), H100)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(2, 100), (1024, 100), (2560, 150), (4096, 200), (16384, 400), (32768, 800)],
)
def test_fragmentation_is_a_line_between_the_replayed_sizes(tokens: int, expected: int) -> None:
    config = a_config(sequence_length=tokens // 2)
    keep(config, SOME, fragmentation=np.array([100.0, 200.0, 400.0]) * MIB)
    predicted = predict_memory(config, TINY, ACCUMULATING, H100)
    assert predicted.breakdown[Part.FRAGMENTATION] == expected * MIB


def test_uneven_partitions_are_predicted_by_the_fuller_rank() -> None:
    config = a_config(engine="deepspeed", zero_stage=1, gpus=4)
    first, last = structures(TINY, config, accumulates=True)
    assert [json.loads(name)["rank"] for name in (first, last)] == [0, 3]
    for name, size in ((first, 1), (last, 2)):
        live = np.zeros((1, len(PARTS), QUANTITIES))
        live[0, PARTS.index(Part.BUFFERS), 0] = size * GIB
        memory._keep(memory._file(name), Stream(live))
    assert predict_memory(config, TINY, ACCUMULATING, H100).allocated_bytes == 2 * GIB


FROM_DISK = """
import sys
from autotune.predict.memory import predict_memory
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload
import json
given = json.load(sys.stdin)
predicted = predict_memory(
    TrialConfig.from_dict(given["config"]),
    ModelSpec(**given["model"]),
    Workload(global_batch_size=64),
    ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB")),
)
print(predicted)
assert not {"torch", "transformers", "deepspeed"} & set(sys.modules)
"""


def test_what_is_traced_is_on_disk_and_needs_no_torch() -> None:
    config = a_config()
    predicted = predict_memory(config, TINY, ACCUMULATING, H100)
    assert predicted.breakdown[Part.FRAGMENTATION] > 0
    given = json.dumps({"config": config.to_dict(), "model": {"name": TINY.name, "config": TINY.config}})
    command = [sys.executable, "-c", FROM_DISK]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(predicted)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b""], ids=["cut off", "empty"])
def test_a_broken_file_is_traced_again(damage: Callable[[bytes], bytes]) -> None:
    config = a_config()
    (name,) = structures(TINY, config, accumulates=False)
    traced = memory.stream(name)
    file = memory._file(name)
    file.write_bytes(damage(file.read_bytes()))
    for _ in range(2):  # traced, and read from what that has written
        memory.stream.cache_clear()
        again = memory.stream(name)
        assert isinstance(again, Stream)
        assert isinstance(traced, Stream)
        assert (again.live == traced.live).all()
    with np.load(file) as stored:
        assert (stored["fragmentation"] == traced.fragmentation).all()


def test_a_folder_that_cannot_be_written_costs_only_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    (name,) = structures(TINY, a_config(), accumulates=False)
    stream = memory.stream(name)
    assert not is_traced(name)
    assert memory.stream(name) is stream


def test_both_kinds_of_streams_come_back_from_disk_as_they_were() -> None:
    one, two = np.arange(len(PARTS) * QUANTITIES, dtype=float).reshape(1, len(PARTS), QUANTITIES), np.array([0])
    (name,) = structures(TINY, a_config(), accumulates=False)
    kinds = (Stream(one, np.array([1.0, 2, 3])), SitedStream(one, 2 * one, two, two, 30.5, np.array([4.0, 5, 6])))
    for stream in kinds:
        memory._keep(memory._file(name), stream)
        memory.stream.cache_clear()
        again = memory.stream(name)
        assert type(again) is type(stream)
        for field in type(stream).__dataclass_fields__:
            np.testing.assert_array_equal(getattr(again, field), getattr(stream, field))


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp16"},
        {"attention": "flash_attention_2"},
        {"attention": "flash_attention_3"},
        {"micro_batch_size": 1},
        {"micro_batch_size": 16},
        {"sequence_length": 4096},
    ],
    ids=str,
)
def test_what_allocates_alike_shares_a_trace(change: dict[str, Any]) -> None:
    base = a_config(precision="bf16", attention="sdpa")
    for model in (TINY, load_model("Qwen/Qwen3-32B", Path.cwd())):
        shared = structures(model, replace(base, **change), accumulates=True)
        assert shared == structures(model, base, accumulates=True)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp32"},
        {"attention": "eager"},
        {"attention": "flex_attention"},
        {"zero_stage": 3},
        {"activation_checkpointing": "full"},
        {"gpus": 4},
    ],
    ids=str,
)
def test_what_allocates_otherwise_does_not(change: dict[str, Any]) -> None:
    base = a_config(precision="bf16", attention="sdpa")
    changed = structures(TINY, replace(base, **change), accumulates=True)
    assert changed != structures(TINY, base, accumulates=True)
    assert structures(TINY, base, accumulates=False) != structures(TINY, base, accumulates=True)


WINDOW = 400
"""Between the lengths that are traced."""


def windowed(model_type: str, **changes: Any) -> ModelSpec:
    config = TINY.config | {"model_type": model_type, "num_hidden_layers": 1, "sliding_window": WINDOW, **changes}
    return ModelSpec(name=model_type, config=config)


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, 2 * WINDOW])
def test_a_sliding_window_has_a_mask_from_its_length_on(length: int) -> None:
    model, config = windowed("mistral"), a_config(sequence_length=length)
    at = np.array([2]), np.array([length])
    (predicted,) = (stream.peak_bytes(*at, "cpu") for stream in rank_streams(model, config, accumulates=False))
    whole = Stream.of(record_trace(model, config, 1, 2, length, accumulates=False))
    assert predicted == whole.peak_bytes(*at, "cpu")


@pytest.mark.parametrize(
    ("model", "config", "lengths"),
    [
        (windowed("mistral"), a_config(), (WINDOW - 1, WINDOW)),
        (windowed("gemma3_text"), a_config(), (WINDOW - 1, WINDOW)),
        (windowed("qwen3", use_sliding_window=True), a_config(), (WINDOW - 1, WINDOW)),
        (windowed("mistral", sliding_window=None), a_config(), None),
        (windowed("qwen3"), a_config(), None),
        (windowed("mistral"), a_config(attention="eager"), None),
        (windowed("mistral"), a_config(attention="flash_attention_2"), None),
        (windowed("qwen3", use_sliding_window=True), a_config(attention="flex_attention"), None),
        (replace(TINY, config=TINY.config | {"model_type": "mistral"}), a_config(), (4095, 4096)),
    ],
    ids=["mistral", "gemma3", "qwen3", "no window", "not used", "eager", "flash", "flex", "default"],
)
def test_a_structure_tells_on_which_side_of_the_window_it_is(
    model: ModelSpec, config: TrialConfig, lengths: tuple[int, int] | None
) -> None:
    below, above = (
        structures(model, replace(config, sequence_length=length), accumulates=False)
        for length in lengths or (WINDOW - 1, WINDOW)
    )
    assert (below == above) == (lengths is None)
