"""Memory of each GPU of one process, and what it costs that they work in turn.

No CPU can show it: the reference is the step of the whole model on FakeTensors with a device each, counted by a tracker
that has nothing from the prediction.
"""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from autotune.modeling.device_map import balanced_map, layers_of_gpus
from autotune.predict.fake import fake_trial
from autotune.predict.memory import context_bytes, predict_memory, rank_streams, structures
from autotune.predict.roofline import TimePart
from autotune.predict.shape import read_shape
from autotune.predict.stream import PipelineStream
from autotune.predict.trials import Trials
from autotune.report.plan import explanation_document, explanation_view
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.request import TrialRequest
from autotune.spec.workload import Workload
from tests.predict.test_fake import TINY
from tests.predict.test_throughput import NODE, trial
from tests.samples import sample_space

BATCH, LENGTH = 3, 96
WORKLOAD = Workload(global_batch_size=BATCH)
TOLERANCE = 0.02


def model(layers: int = 8) -> ModelSpec:
    return ModelSpec(name="spread", config={**TINY.config, "num_hidden_layers": layers})


def config(gpus: int, **fields: Any) -> TrialConfig:
    adapters = {"method": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
    plain = {"engine": "pytorch", "micro_batch_size": BATCH, "sequence_length": LENGTH, "device_map": "auto"}
    return TrialConfig.from_dict({**plain, **adapters, "gpus": gpus, **fields})


class ByDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has not annotated it
    """Highest live bytes of each device."""

    def __init__(self, devices: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._live, self.peaks = [0] * devices, [0] * devices
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type != "meta":
                self._count(leaf)
        return result

    def _count(self, tensor: FakeTensor) -> None:
        storage, at = tensor.untyped_storage(), tensor.fake_device.index or 0
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._release(key, at, size))
        self._live[at] += size
        self.peaks[at] = max(self.peaks[at], self._live[at])

    def _release(self, key: int, at: int, size: int) -> None:
        del self._known[key]
        self._live[at] -= size

    def forget(self) -> None:
        """The peaks so far."""
        self.peaks = [*self._live]


def of_the_whole_model(spec: ModelSpec, trial: TrialConfig) -> list[int]:
    request = TrialRequest(trial_id="whole", model=spec, workload=WORKLOAD, config=trial, device="cpu")
    counted = ByDevice(trial.gpus)
    with fake_trial(request, counted) as fake:
        fake.run([True])
        counted.forget()
        fake.run([True])
    return counted.peaks


CASES: list[tuple[bool, int, dict[str, Any]]] = [
    (False, 2, {}),
    (True, 3, {"activation_checkpointing": "full"}),
    (True, 3, {"precision": "fp32"}),
    (True, 4, {"method": "qlora"}),
    (True, 4, {"method": "qlora", "activation_checkpointing": "full"}),
    (True, 3, {"activation_checkpointing": "selective", "selective_every": 3}),
    (True, 3, {"activation_checkpointing": "selective_ops"}),
    (True, 3, {"batching": "padded", "activation_checkpointing": "full"}),
    (True, 4, {"attention": "eager"}),
]


@pytest.mark.parametrize(
    ("gpus", "fields"), [pytest.param(*case, marks=[pytest.mark.slow] if dear else []) for dear, *case in CASES]
)
def test_every_gpu_is_predicted(gpus: int, fields: dict[str, Any]) -> None:
    trial = config(gpus, **fields)
    # The deeper, so that a line in depth is carried on where every third layer is alike.
    spec = model(gpus * (14 if trial.selective_every else 9))
    layers = layers_of_gpus(balanced_map(spec, trial), spec.num_hidden_layers, gpus)
    assert max(layers) > 7  # so that layers are added to what was traced
    peaks = of_the_whole_model(spec, trial)
    for stream in rank_streams(spec, trial, accumulates=False):
        assert not isinstance(stream, PipelineStream)
        assert stream.layers.tolist() == layers
        peak = float(stream.peak_bytes(np.array([BATCH]), np.array([LENGTH]), "cuda")[0])
        assert peak == pytest.approx(peaks[stream.gpu], rel=TOLERANCE)
    predicted = predict_memory(trial, spec, WORKLOAD, NODE)
    assert predicted.allocated_bytes == pytest.approx(max(peaks), rel=TOLERANCE)
    assert peaks[predicted.gpu] >= (1 - TOLERANCE) * max(peaks)


def test_of_many_gpus_three_are_traced() -> None:
    assert [len(structures(model(), config(gpus), accumulates=True)) for gpus in (2, 3, 8)] == [2, 3, 3]


def test_gpus_in_turn_are_as_fast_as_one() -> None:
    """A GPU's share of the throughput is an N-th, less what goes from one to the next."""
    fields = {"micro_batch_size": 2, "sequence_length": 4096, "activation_checkpointing": "full"}
    alone = trial(config(1, device_map="none", **fields))
    for gpus in (2, 4, 8):
        spread = trial(config(gpus, **fields))
        sent = spread.breakdown[TimePart.PIPELINE_TRANSFER]
        assert sent > 0
        assert spread.breakdown[TimePart.GRADIENT_REDUCTION] == spread.breakdown[TimePart.PARAMETER_GATHER] == 0
        assert spread.step_time_seconds == pytest.approx(alone.step_time_seconds + sent, rel=1e-6)
        whole = gpus * spread.tokens_per_second_per_gpu * spread.step_time_seconds
        assert whole == pytest.approx(alone.tokens_per_second_per_gpu * alone.step_time_seconds)
    sharded = trial(config(8, device_map="none", zero_stage=3, **fields))
    assert sharded.tokens_per_second_per_gpu > 3 * trial(config(8, **fields)).tokens_per_second_per_gpu


def test_candidates_in_columns_are_the_same(tmp_path: Path) -> None:
    cluster = {"nodes": 1, "gpus_per_node": 4, "gpu": "H100-80GB"}
    search = {"engine": "pytorch", "gpus": [2, 4], "zero_stage": [0, 3], "micro_batch_size": [1, 2]}
    space = sample_space(
        tmp_path, cluster=cluster, search={**search, "device_map": ["none", "auto"]}, method="lora", baseline=...
    )
    shape = read_shape(space.model.name, space.model.config)
    columns, alike = Trials.of_candidates(space, shape)
    one_by_one = Trials.of(list(space.candidates), space.workload, shape)
    assert set(one_by_one.in_turn.tolist()) == {1, 2, 4}
    for name in ("in_turn", "accumulation", "gpus", "micro_batch"):
        assert getattr(columns, name)[alike].tolist() == getattr(one_by_one, name).tolist()


def test_the_report_names_the_fullest(tmp_path: Path) -> None:
    cluster = {"nodes": 1, "gpus_per_node": 4, "gpu": "H100-80GB"}
    search = {
        "engine": "pytorch",
        "gpus": [2, 4],
        "zero_stage": 0,
        "micro_batch_size": 2,
        "device_map": ["none", "auto"],
    }
    space = sample_space(tmp_path, cluster=cluster, search=search, method="lora", baseline=...)
    spread = next(found for found in space.candidates if found.device_map == "auto" and found.gpus == 2)
    memory = predict_memory(spread, space.model, space.workload, space.cluster)
    assert sum(memory.layers_of_gpus) == space.model.num_hidden_layers
    document = explanation_document(space, spread, memory, [])
    assert (document["gpu"], document["layers_of_gpus"]) == (memory.gpu, memory.layers_of_gpus)
    layers = ", ".join(map(str, memory.layers_of_gpus))
    console = Console(width=200)
    with console.capture() as said:
        console.print(explanation_view(space, spread, memory, []))
    assert f"on GPU {memory.gpu}, the fullest of 2, which have {layers} layers" in said.get()
    plain = predict_memory(replace(spread, device_map="none"), space.model, space.workload, space.cluster)
    assert "gpu" not in explanation_document(space, spread, plain, [])


def test_no_communicator_is_counted_for_one_process() -> None:
    cluster = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("H100-80GB"))
    assert context_bytes(config(8), cluster) == context_bytes(config(1, device_map="none"), cluster)
