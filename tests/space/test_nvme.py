"""`offload: optimizer_nvme`: searched where there is a folder for it, and refused where DeepSpeed would not swap."""

from pathlib import Path
from typing import Any

import pytest

from autotune.errors import InvalidSpaceError
from autotune.space import nvme
from autotune.space.nvme import NVME_RULES
from autotune.spec.cluster import ClusterSpec, NvmeSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.nvme import largest_partition, stored_bytes, swapping_bytes
from autotune.spec.workload import Workload
from autotune.units import GIB
from tests.samples import SPACE, sample_space

H100 = find_gpu("H100-80GB")
SEARCH: dict[str, Any] = {
    "engine": ["deepspeed", "pytorch"],
    "zero_stage": [2, 3],
    "offload": ["none", "optimizer_nvme"],
    "activation_checkpointing": "none",
    "precision": "bf16",
    "micro_batch_size": [1],
}


@pytest.fixture(autouse=True)
def buildable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking DeepSpeed takes seconds, and the answer is the machine's."""
    monkeypatch.setattr(nvme, "async_io_error", lambda: None)


def refusal(config: TrialConfig, cluster: ClusterSpec) -> str | None:
    model, work = load_model("Qwen/Qwen3-32B", Path.cwd()), Workload(global_batch_size=64)
    reasons = (rule(config, work, model, cluster) for rule in NVME_RULES)
    return next((reason for reason in reasons if reason is not None), None)


def on_nodes(nodes: int = 1, **disk: Any) -> ClusterSpec:
    return ClusterSpec(nodes=nodes, gpus_per_node=8, gpu=H100, nvme=NvmeSpec(path="/local_nvme", **disk))


def states(**fields: Any) -> TrialConfig:
    plain = {"engine": "deepspeed", "gpus": 8, "micro_batch_size": 1, "sequence_length": 4096, "zero_stage": 3}
    return TrialConfig.from_dict(plain | {"offload": "optimizer_nvme"} | fields)


def test_it_is_searched_under_zero_3_of_deepspeed_alone(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=SEARCH, nvme={"path": "/local_nvme"})
    swapping = [config for config in space.candidates if config.offload == "optimizer_nvme"]
    assert [(config.engine, config.zero_stage) for config in swapping] == [("deepspeed", 3)]
    assert space.dropped == ()
    reasons = " ".join(space.illegal)
    assert "under 2 DeepSpeed keeps the states in main memory and says nothing" in reasons
    assert "offload optimizer_nvme is run by engine deepspeed alone" in reasons
    assert "offload optimizer_nvme" in swapping[0].describe()


def test_without_a_folder_it_is_dropped(tmp_path: Path) -> None:
    space = sample_space(tmp_path, search=SEARCH | {"engine": "deepspeed", "zero_stage": 3})
    (dropped,) = space.dropped
    assert (dropped.axis, dropped.value) == ("offload", "optimizer_nvme")
    assert "state nvme: {path: /local_nvme}" in dropped.reason


def test_without_libaio_it_is_dropped_where_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "async_io_error", lambda: "apt-get install libaio-dev")
    monkeypatch.setattr(nvme, "DRIVER", tmp_path / "no-driver")
    search = SEARCH | {"engine": "deepspeed", "zero_stage": 3}
    (dropped,) = sample_space(tmp_path, search=search, nvme={"path": "/local_nvme"}).dropped
    assert "libaio-dev" in dropped.reason
    assert refusal(states(), on_nodes()) is None  # of a cluster elsewhere
    monkeypatch.setattr(nvme, "DRIVER", tmp_path)
    assert "libaio-dev" in str(refusal(states(), on_nodes()))


@pytest.mark.parametrize(
    ("nodes", "gpus", "free", "fits"),
    [(1, 8, 480, False), (1, 8, 500, True), (2, 16, 240, False), (2, 16, 250, True), (1, 8, None, True)],
)
def test_what_does_not_fit_on_a_nodes_disk_is_refused(nodes: int, gpus: int, free: int | None, fits: bool) -> None:
    """Of 32.8e9 parameters with 16 bytes each: 488 GiB over the nodes."""
    disk = {} if free is None else {"free_bytes": free * 1024**3}
    reason = refusal(states(gpus=gpus), on_nodes(nodes, **disk))
    assert (reason is None) == fits
    assert fits or f"has {free} GiB free" in str(reason)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"offload": "optimizer", "zero_stage": 2, "tensor_parallel_size": 2}, None),
        ({"tensor_parallel_size": 2}, "has not been tried with tensor_parallel_size 2"),
        ({"zero_quantized_weights": True}, "has not been tried with zero_quantized_weights True"),
        ({"deepspeed": {"zero_optimization.zero_hpz_partition_size": 8}}, "zero_hpz_partition_size 8; use 1"),
        ({"method": "lora", "lora_rank": 16, "lora_target_modules": "all-linear"}, "what method lora trains is small"),
    ],
)
def test_what_has_not_been_tried_is_refused(fields: dict[str, Any], reason: str | None) -> None:
    found = refusal(states(**fields), on_nodes())
    assert reason in found if reason and found else found is reason


@pytest.mark.parametrize(
    ("count", "read", "write", "fits"),
    [
        (3, False, False, False),
        (4, False, False, True),
        (8, True, False, True),
        (8, True, True, False),
        (12, True, True, True),
    ],
)
def test_each_sub_group_in_flight_has_buffers(count: int, read: bool, write: bool, fits: bool) -> None:
    keys = {"buffer_count": count, "pipeline_read": read, "pipeline_write": write}
    given = {f"zero_optimization.offload_optimizer.{key}": value for key, value in keys.items()}
    reason = refusal(states(deepspeed=given), on_nodes())
    assert (reason is None) == fits
    assert fits or f"buffer_count is {count}, and it needs {4 + 4 * read + 4 * write}" in str(reason)


PARAMETERS = {"offload": "optimizer_nvme+parameters_nvme"}


@pytest.mark.parametrize(
    ("fields", "keys", "reason"),
    [
        ({}, {}, None),  # 151,936 x 5,120 elements of the embedding over 8 ranks are less than DeepSpeed's 10^8
        ({"gpus": 4}, {}, "on 4 GPUs needs 194478080 or more as DeepSpeed's"),
        ({"gpus": 4}, {"offload_param.buffer_size": 194_478_080}, None),
        (
            {},
            {"offload_param.buffer_size": 50_000_000},
            "buffer_size, and it is 50000000; set it under search.deepspeed",
        ),
        ({}, {"offload_param.buffer_count": 4}, None),
        ({}, {"offload_param.buffer_count": 3}, "needs 4 or more as DeepSpeed's"),
        ({}, {"stage3_prefetch_bucket_size": 50_000_000}, "runs out of buffers where DeepSpeed reads ahead"),
        ({}, {"stage3_max_reuse_distance": 1}, "leave zero_optimization.stage3_max_reuse_distance out"),
        ({}, {"stage3_max_reuse_distance": 0}, None),
        ({"activation_checkpointing": "selective_ops"}, {}, "where selective_ops fails"),
        ({"zero_stage": 2}, {}, "offload optimizer_nvme+parameters_nvme needs zero_stage 3"),
    ],
)
def test_parameters_on_a_disk_need_buffers_and_nothing_ahead(
    fields: dict[str, Any], keys: dict[str, Any], reason: str | None
) -> None:
    given = {f"zero_optimization.{key}": value for key, value in keys.items()}
    found = refusal(states(**PARAMETERS | fields, deepspeed=given), on_nodes())
    assert reason in found if reason and found else found is reason
    elsewhere = states(**fields | {"offload": "optimizer_nvme+parameters"}, deepspeed=given)
    assert refusal(elsewhere, on_nodes()) is None or "zero_stage" in fields


def test_parameters_on_a_disk_have_not_been_tried_with_experts() -> None:
    dense = load_model("Qwen/Qwen3-0.6B", Path.cwd())
    experts = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    model = ModelSpec(name="experts", config=dense.config | experts)
    reasons = [rule(states(**PARAMETERS), Workload(global_batch_size=64), model, on_nodes()) for rule in NVME_RULES]
    assert [reason for reason in reasons if reason] == [
        "offload optimizer_nvme+parameters_nvme has not been tried with qwen3_moe models; use optimizer_nvme+parameters"
    ]


@pytest.mark.parametrize(
    ("offload", "gpus", "sub_group", "on_disk", "in_memory"),
    [
        ("optimizer_nvme", 8, 10**9, 488, 180),
        ("optimizer_nvme", 8, 10**8, 488, 73),
        ("optimizer_nvme+parameters", 8, 10**8, 488, 134),
        ("optimizer_nvme+parameters_nvme", 8, 10**8, 549, 92),
        ("optimizer_nvme+parameters_nvme", 8, 10**9, 549, 307),
        ("optimizer_nvme", 1, 10**9, 488, 76),
        ("optimizer_nvme+parameters", 1, 10**9, 488, 137),
        ("optimizer_nvme+parameters_nvme", 1, 10**9, 549, 85),
    ],
)
def test_qwen3_32b_on_a_node(offload: str, gpus: int, sub_group: int, on_disk: int, in_memory: int) -> None:
    """In GiB."""
    model = load_model("Qwen/Qwen3-32B", Path.cwd())
    keys = {"sub_group_size": sub_group, "offload_param.buffer_size": largest_partition(model, gpus)}
    given = {f"zero_optimization.{key}": value for key, value in keys.items()}
    config = states(offload=offload, gpus=gpus, deepspeed=given)
    assert round(stored_bytes(config, model, 8) / GIB) == on_disk
    assert round(gpus * swapping_bytes(config, model) / GIB) == in_memory


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"path": "local_nvme"}, "nvme.path: found 'local_nvme'; a folder on each node begins with /"),
        ({}, "nvme.path: is missing"),
        ({"path": "/x", "free": "1TiB"}, "allowed here: path, free_bytes, bandwidth_bytes_per_second"),
        ({"path": "/x", "bandwidth_bytes_per_second": 0}, "nvme.bandwidth_bytes_per_second: found 0"),
    ],
)
def test_a_section_that_says_nothing_usable(tmp_path: Path, section: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSpaceError, match=says):
        sample_space(tmp_path, search=SPACE["search"], nvme=section)


def test_a_stored_study_knows_its_disk(tmp_path: Path) -> None:
    section = {"path": "/local_nvme", "free_bytes": "2TiB", "bandwidth_bytes_per_second": 12e9}
    space = sample_space(tmp_path, search=SEARCH, nvme=section)
    cluster = ClusterSpec.from_dict(space.cluster.to_dict())
    assert cluster == space.cluster
    assert cluster.nvme == NvmeSpec(path="/local_nvme", free_bytes=2 * 1024**4, bandwidth_bytes_per_second=12e9)
