"""Memory and time of tiled MLPs: against real gloo ranks, a trace of a long sequence itself, and the same without."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.predict.memory import rank_streams
from autotune.predict.roofline import TimePart
from autotune.predict.stream import Stream
from autotune.predict.throughput import predict_trials
from autotune.predict.trace import pieces, record_trace, trace_stream
from autotune.predict.trials import Trials
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.workload import Workload
from autotune.trial.pool import NodePool
from tests.engines.parity import SMALL_BUCKETS
from tests.predict.test_layout_memory import SHARDED, a_request, degrees, measured, predicted
from tests.predict.test_method_memory import DEEPSPEED, PYTORCH, lora
from tests.predict.test_throughput import NODE, SHAPE, TRIAL

FULL = {"activation_checkpointing": "full"}
SELECTIVE = {"activation_checkpointing": "selective", "selective_every": 2}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodePool]:
    pool = NodePool(device="cpu", log_dir=str(tmp_path_factory.mktemp("logs")))
    yield pool
    pool.shutdown()


def tiled(engine: str, stage: int, **fields: Any) -> dict[str, Any]:
    keys = {"deepspeed": dict(SMALL_BUCKETS)} if engine == "deepspeed" else {}
    return {"engine": engine, "zero_stage": stage, "precision": "bf16", "tiled_mlp": True, **keys, **fields}


CASES = [
    (False, 2, 2, 2, tiled("pytorch", 3, **FULL)),
    (True, 2, 2, 2, tiled("deepspeed", 3, **FULL)),
    (True, 8, 2, 2, tiled("pytorch", 3)),
    (True, 8, 2, 2, tiled("pytorch", 2, **SELECTIVE, precision="fp32")),
    (True, 8, 2, 2, tiled("pytorch", 0)),
    (True, 8, 2, 2, tiled("pytorch", 0, **FULL, precision="fp32")),
    (True, 8, 1, 2, tiled("pytorch", 3, **FULL, offload="optimizer+parameters")),
    (True, 8, 2, 2, tiled("pytorch", 0, **degrees(tensor=2), **FULL, loss="chunked", precision="fp32")),
    (True, 8, 2, 2, tiled("pytorch", 3, **degrees(sequence=2), **FULL, loss="chunked")),
    (True, 8, 2, 4, tiled("pytorch", 3, **degrees(tensor=2, sequence=2), **FULL)),
    (True, 8, 4, 2, tiled("pytorch", 0, **degrees(pipeline=2, schedule="1f1b"), precision="fp32")),
    (True, 8, 2, 2, tiled("pytorch", 3, **FULL) | lora("pytorch", 3)),
    *((True, 12, 2, 2, tiled("deepspeed", stage, **FULL)) for stage in range(4)),
    (True, 12, 2, 2, tiled("deepspeed", 2, precision="fp32")),
    (True, 12, 2, 2, tiled("deepspeed", 3)),
    (True, 10, 2, 2, tiled("deepspeed", 3, **degrees(sequence=2), **FULL) | SHARDED),
    (True, 12, 2, 2, tiled("deepspeed", 2, **degrees(tensor=2), **FULL, precision="fp32")),
    (True, 2, 2, 2, tiled("deepspeed", 3, **FULL) | lora("deepspeed", 3)),
]


@pytest.mark.parametrize(
    ("layers", "steps", "gpus", "fields"),
    [pytest.param(*case, marks=[pytest.mark.slow] if dear else []) for dear, *case in CASES],
)
def test_every_rank_is_predicted(pool: NodePool, layers: int, steps: int, gpus: int, fields: dict[str, Any]) -> None:
    request = a_request(layers, steps, gpus, fields)
    of_a_stage = gpus // request.config.pipeline_parallel_size
    tolerance = PYTORCH if request.config.engine == "pytorch" else DEEPSPEED
    peaks = measured(pool, request)
    for rank in range(0, gpus, of_a_stage):
        found = predicted(request, steps, rank)
        assert peaks[rank : rank + of_a_stage] == [pytest.approx(found, rel=tolerance)] * of_a_stage


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"engine": "pytorch", "sequence_parallel_size": 8, "loss": "chunked"},
        {"engine": "pytorch", "sequence_parallel_size": 2, "tensor_parallel_size": 4, "loss": "chunked"},
        {"engine": "pytorch", "activation_checkpointing": "none"},
        {"engine": "deepspeed", "sequence_parallel_size": 8},
    ],
)
def test_long_sequences_are_carried_on_from_short_ones(fields: dict[str, Any]) -> None:
    """Of Qwen3-32B with eight layers, and 32,768 tokens traced as they are."""
    layers, length = 8, 32768
    config = TrialConfig.from_dict(
        {"zero_stage": 3, "gpus": 8, "micro_batch_size": 1, "sequence_length": length, "tiled_mlp": True}
        | {"activation_checkpointing": "full", **fields}
    )
    whole = load_model("Qwen/Qwen3-32B", Path())
    model = ModelSpec(name="shallow", config={**whole.config, "num_hidden_layers": layers})
    direct = Stream.of(record_trace(model, config, layers, 1, length // pieces(config), accumulates=True))
    direct = replace(direct, pieces=pieces(config))
    carried = trace_stream(model, config, accumulates=True)
    at = np.array([1]), np.array([length])
    assert carried.peak_bytes(*at, "cuda") == pytest.approx(direct.peak_bytes(*at, "cuda"), rel=0.01)


def test_what_lies_between_the_matrices_shrinks_with_the_pieces() -> None:
    """A wide MLP: with full checkpointing and a chunked loss one layer's decides."""
    request = a_request(2, 1, 2, {"zero_stage": 3, "loss": "chunked", **FULL})
    wide = ModelSpec(name="wide", config={**request.model.config, "intermediate_size": 4096})
    peaks = []
    for value in (False, True):
        config = replace(request.config, tiled_mlp=value)
        (stream,) = rank_streams(wide, config, accumulates=False)
        short, long = stream.peak_bytes(np.array([8, 8]), np.array([4096, 8192]), "cuda").tolist()
        peaks.append((long - short) / (8 * 4096) / 4)  # values a token
    assert peaks[0] > 4 * 4096
    assert peaks[1] < 0.3 * peaks[0]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_step_takes_longer_by_the_mlp_once_more_and_by_sums_that_tokens_share(checkpointing: Any) -> None:
    ratios = []
    for rows in (2, 16):
        config = replace(TRIAL, zero_stage=3, micro_batch_size=rows, activation_checkpointing=checkpointing)
        work = Workload(global_batch_size=8 * rows)
        plain, pieced = (
            predict_trials(SHAPE, Trials.of([replace(config, tiled_mlp=value)], work, SHAPE), NODE).at(0).breakdown
            for value in (False, True)
        )
        assert pieced[TimePart.MATMUL] == plain[TimePart.MATMUL]
        more = pieced[TimePart.RECOMPUTATION] - plain[TimePart.RECOMPUTATION]
        ratios.append(more / plain[TimePart.MATMUL])
    # Of this model's matrices five sixths are the MLP's, and one pass of three is computed again.
    assert 0.28 < ratios[1] < 0.45
    assert ratios[0] > ratios[1]
