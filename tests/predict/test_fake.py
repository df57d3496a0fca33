"""The traced step against the real one: equal peaks, to the byte, on every rank."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import transformers.masking_utils
from torch._C._dynamo import guards
from torch._inductor.async_compile import AsyncCompile
from torch.nn.parallel import DistributedDataParallel

from autotune.errors import UsageError
from autotune.formats.deepspeed_json import async_io_error
from autotune.modeling.memory_tracker import COMPILED, MemoryTracker
from autotune.predict.fake import fake_trial
from autotune.predict.fake_mode import FakeData
from autotune.spec.config import ActivationCheckpointing, Engine, Offload, Precision, Scalar, TrialConfig
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.nvme import AHEAD_KEYS, largest_partition
from autotune.spec.request import TrialRequest
from autotune.spec.workload import MeasureSettings, Workload
from autotune.trial.measure import measure_plan, warmup_plan
from autotune.trial.pool import NodePool

GIB = 1024**3
TINY = ModelSpec(
    name="tiny-qwen3",
    config={
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
)
WIDE = ModelSpec(  # whose partitions are large enough to be swapped to a disk, and whose gradients lie on blocks of it
    name="wide", config=TINY.config | {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 256}
)
WIDER = replace(WIDE, config=WIDE.config | {"hidden_size": 1024})  # and whose parameters in bf16 are, too
ALL_ON_DISK: dict[str, Any] = {
    "offload": "optimizer_nvme+parameters_nvme",
    "model": WIDER,
    "offload_param.buffer_size": largest_partition(WIDER, 2),
    **{key.partition(".")[2]: 0 for key in AHEAD_KEYS},  # after the buckets, which are small
}
TIED = ModelSpec(name="tied", config=TINY.config | {"tie_word_embeddings": True})
SMALL_BUCKETS = tuple(
    (f"zero_optimization.{key}", 20_000)
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
)


def a_request(
    engine: Engine,
    zero_stage: int,
    precision: Precision = "bf16",
    checkpointing: ActivationCheckpointing = "none",
    micro_batch_size: int = 2,
    offload: Offload = "none",
    *,
    gpus: int = 2,
    accumulation: int = 2,
    model: ModelSpec = TINY,
    sequence_length: int = 64,
    tensor: int = 1,
    **keys: Scalar,
) -> TrialRequest:
    return TrialRequest(
        trial_id=f"{engine}-{zero_stage}-{precision}-{checkpointing}-{micro_batch_size}-{offload}-tp{tensor}",
        model=model,
        workload=Workload(global_batch_size=accumulation * gpus // tensor * micro_batch_size),
        config=TrialConfig(
            engine=engine,
            gpus=gpus,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            precision=precision,
            zero_stage=zero_stage,
            offload=offload,
            activation_checkpointing=checkpointing,
            tensor_parallel_size=tensor,
            deepspeed=(
                (*SMALL_BUCKETS, *((f"zero_optimization.{key}", value) for key, value in keys.items()))
                if engine == "deepspeed" and zero_stage
                else ()
            ),
        ),
        device="cpu",
        measure=MeasureSettings(micro_steps=3),
        memory_limit_bytes=1 << 30,
    )


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodePool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        pool = NodePool(device="cpu", log_dir=str(tmp_path_factory.mktemp("logs")))
    yield pool
    pool.shutdown()


def measured_peaks(pool: NodePool, request: TrialRequest) -> list[int]:
    result = pool.run(
        request,
        ranks=range(2),
        world_size=2,
        master_address="127.0.0.1",
        master_port=pool.free_port(),
        owner_pid=None,
    )
    assert result.failure is None
    return [rank.peak_memory_allocated_bytes for rank in result.ranks]


def traced_peak(request: TrialRequest, rank: int = 0) -> int:
    accumulation = request.workload.micro_steps(request.config)
    tracker = MemoryTracker()
    with fake_trial(request, tracker, rank) as trial:
        tracker.reset_peak()
        trial.run(warmup_plan(accumulation, request.measure.warmup))
        trial.run(measure_plan(accumulation, request.measure.micro_steps))
        return tracker.peak_bytes


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(request, id=request.trial_id, marks=[pytest.mark.slow] if dear else [])
        for dear, request in [
            (True, a_request("pytorch", 0)),
            (True, a_request("pytorch", 0, "fp32", "full", accumulation=1)),
            (True, a_request("pytorch", 0, "fp16", "full", 1)),
            (True, a_request("pytorch", 2, "bf16", "full")),
            (True, a_request("pytorch", 2, "fp32", "none", 1)),
            (False, a_request("pytorch", 3, "bf16", "full")),
            (True, a_request("pytorch", 3, "fp32", accumulation=1)),
            (False, a_request("pytorch", 3, "bf16", "selective_ops", offload="optimizer+parameters")),
            (True, a_request("pytorch", 2, "fp32", "full", offload="optimizer+parameters", accumulation=1)),
            (True, a_request("pytorch", 0, "bf16", "selective_ops")),
            (True, a_request("deepspeed", 3, "bf16", "selective_ops")),
            (True, a_request("deepspeed", 2, "fp32", "selective_ops")),
            (True, a_request("deepspeed", 0, "fp32")),
            (True, a_request("deepspeed", 0, "bf16", "full", 4)),
            (True, a_request("deepspeed", 1, "bf16")),
            (True, a_request("deepspeed", 1, "fp32", "full", accumulation=1)),
            (False, a_request("deepspeed", 2, "bf16")),
            (True, a_request("deepspeed", 2, "fp32", "full", 4)),
            (True, a_request("deepspeed", 2, "bf16", offload="optimizer")),
            (True, a_request("deepspeed", 3, "bf16", "full")),
            (True, a_request("deepspeed", 3, "fp32", accumulation=1)),
            (True, a_request("deepspeed", 3, "bf16", offload="optimizer+parameters")),
            (True, a_request("deepspeed", 1, "fp32", "full", tensor=2)),
            (False, a_request("deepspeed", 2, tensor=2)),
            (True, a_request("deepspeed", 2, tensor=2, model=TIED)),
            (True, a_request("deepspeed", 3, tensor=2, offload="optimizer")),
            # Parameters that persist, by default all of so small a model, have no second copy.
            (False, a_request("deepspeed", 3, zero_hpz_partition_size=2, stage3_param_persistence_threshold=1000)),
        ]
    ],
)
def test_peaks_are_those_of_the_real_step(pool: NodePool, request_: TrialRequest) -> None:
    assert [traced_peak(request_, rank) for rank in range(2)] == measured_peaks(pool, request_)


@pytest.mark.slow
def test_a_disk_that_only_pretends_needs_the_memory_of_a_real_one(tmp_path: Path) -> None:
    """With a pool of its own, which keeps what it builds for the next run: DeepSpeed's op takes minutes."""
    if reason := async_io_error():
        pytest.skip(reason)
    disk = tmp_path / "disk"
    disk.mkdir()
    swapping = NodePool(device="cpu", log_dir=str(tmp_path / "logs"))
    try:
        for request in (
            a_request("deepspeed", 3, "bf16", offload="optimizer_nvme", model=WIDE),
            a_request("deepspeed", 3, "fp32", "full", accumulation=1, offload="optimizer_nvme", model=WIDE),
            a_request("deepspeed", 3, "bf16", offload="optimizer_nvme", model=WIDE, sub_group_size=300_000),
            a_request("deepspeed", 3, "bf16", offload="optimizer_nvme+parameters", model=WIDE),
            a_request("deepspeed", 3, "bf16", **ALL_ON_DISK),
            a_request("deepspeed", 3, "fp32", "full", accumulation=1, **ALL_ON_DISK),
            a_request("deepspeed", 3, "bf16", sub_group_size=300_000, **ALL_ON_DISK),
        ):
            real = replace(request, nvme_path=str(disk), timeout_seconds=1200)
            assert [traced_peak(request, rank) for rank in range(2)] == measured_peaks(swapping, real)
            assert list(disk.iterdir()) == []
    finally:
        swapping.shutdown()


@pytest.mark.parametrize(("engine", "zero_stage"), [("pytorch", 3), ("deepspeed", 2)])
def test_one_process_traces_any_number_of_ranks_again_and_again(engine: Engine, zero_stage: int) -> None:
    peaks = [traced_peak(a_request(engine, zero_stage, gpus=gpus), gpus - 1) for gpus in (64, 2, 64)]
    assert peaks[1] > peaks[0] == peaks[2]


def test_what_no_host_could_hold_is_traced_without_memory() -> None:
    model = load_model("Qwen/Qwen3-32B", Path.cwd())
    shallow = ModelSpec(name=model.name, config={**model.config, "num_hidden_layers": 2})
    request = a_request("pytorch", 0, gpus=1, micro_batch_size=64, sequence_length=4096, model=shallow)
    before = psutil.Process().memory_info().rss
    assert traced_peak(request) > 500 * GIB
    assert psutil.Process().memory_info().rss - before < GIB


def test_fp16_on_deepspeed_needs_no_processor_that_has_it() -> None:
    assert traced_peak(a_request("deepspeed", 2, "fp16")) == traced_peak(a_request("deepspeed", 2, "bf16"))


def surroundings() -> tuple[object, ...]:
    return (
        dist.is_initialized(),
        torch._C._len_torch_dispatch_stack(),
        transformers.masking_utils.find_packed_sequence_indices,
        DistributedDataParallel._ddp_init_helper,
        torch.UntypedStorage.resize_,
        vars(guards)["_reinterpret_tensor"],
        AsyncCompile.cpp_pybinding,
        COMPILED.allocate,
        FakeData.__torch_dispatch__,
        MemoryTracker.__torch_dispatch__,
        dict(os.environ),
    )


@pytest.mark.parametrize("engine", ["pytorch", "deepspeed"])
def test_everything_is_as_before_even_after_an_error(engine: Engine) -> None:
    before = surroundings()
    with pytest.raises(ZeroDivisionError), fake_trial(a_request(engine, 0), MemoryTracker()):
        raise ZeroDivisionError
    assert surroundings() == before


def compiled(request: TrialRequest) -> TrialRequest:
    return replace(request, config=replace(request.config, torch_compile=True))


@pytest.mark.slow
def test_compiled_layers_need_less_and_leave_nothing_behind() -> None:
    before = surroundings()
    request = a_request("pytorch", 3, accumulation=1)
    whole = traced_peak(request)
    assert 0.7 * whole < traced_peak(compiled(request)) < 0.98 * whole
    assert surroundings() == before
    assert traced_peak(request) == whole


def test_an_engine_that_refuses_leaves_nothing_behind() -> None:
    before = surroundings()
    with pytest.raises(UsageError, match="zero_stage"), fake_trial(a_request("pytorch", 1), MemoryTracker()):
        pass
    assert surroundings() == before


def test_a_process_that_has_a_group_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with (
            pytest.raises(RuntimeError, match="no process group"),
            fake_trial(a_request("pytorch", 0), MemoryTracker()),
        ):
            pass
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()
