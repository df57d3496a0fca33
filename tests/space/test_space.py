"""Axes, candidates and refusals."""

from pathlib import Path

import pytest

from autotune.errors import InvalidSpaceError, NothingFeasibleError
from autotune.space.space import NOT_APPLICABLE, load_space
from autotune.spec.cluster import ClusterSpec, find_gpu
from tests.samples import sample_space, space_text

SHIPPED = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
BUCKET = "zero_optimization.reduce_bucket_size"
PREFETCH = "zero_optimization.stage3_prefetch_bucket_size"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spaces_load(path: Path) -> None:
    space = load_space(path)
    assert space.name == path.stem
    assert len(space.candidates) > 100
    assert space.baseline is not None
    assert space.refusal(space.baseline) is None
    assert not space.dropped


def test_candidates_are_legal_distinct_and_survive_the_round_trip(tmp_path: Path) -> None:
    space = sample_space(tmp_path)
    assert len(set(space.candidates)) == len(space.candidates)
    assert len(space.candidates) + sum(space.illegal.values()) == 2 * 2 * 4 * 2 * 4
    for config in space.candidates:
        assert space.refusal(config) is None
        assert config in space
        values = space.values(config)
        assert space.config({a: space.axes[a][0] if v == NOT_APPLICABLE else v for a, v in values.items()}) == config


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"search": {"engine": "pytorch", "zero_stage": [0, 1]}}, "zero_stage 1 does not exist"),
        ({"search": {"micro_batch_size": [1, 3]}}, "no multiple"),
        ({"search": {"gpus": [2, 4]}}, "more than the cluster's 2"),
        ({"search": {"engine": "pytorch", "zero_stage": 3, "offload": ["none", "optimizer"]}}, "deepspeed alone"),
        ({"search": {"engine": "deepspeed", "zero_stage": [0, 1], "offload": ["none", "optimizer"]}}, "needs ZeRO"),
        (
            {"search": {"engine": "deepspeed", "zero_stage": [2, 3], "offload": "optimizer+parameters"}},
            "needs zero_stage 3",
        ),
        (
            {"search": {"activation_checkpointing": ["none", "selective"], "selective_every": [2, 9]}},
            "selective_every 9",
        ),
        ({"search": {"engine": "deepspeed", "precision": ["fp16", "fp32"]}}, "needs a GPU"),
        ({"search": {"attention": ["sdpa", "flash_attention_2"]}}, "needs a GPU"),
    ],
)
def test_illegal_combinations_are_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    space = sample_space(tmp_path, baseline=..., **changes)
    assert space.candidates
    assert any(reason in found for found in space.illegal), space.illegal


def test_a_value_without_any_legal_candidate_is_dropped_with_the_reason(tmp_path: Path) -> None:
    search = {"engine": ["deepspeed"], "precision": ["bf16", "fp16"], "attention": ["sdpa", "flash_attention_2"]}
    space = sample_space(tmp_path, baseline=..., search=search)
    dropped = {(item.axis, item.value): item.reason for item in space.dropped}
    assert set(dropped) == {("precision", "fp16"), ("attention", "flash_attention_2")}
    assert all("GPU" in reason for reason in dropped.values())


def test_only_impossible_values_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(NothingFeasibleError, match=r"no combination .* is legal.* needs a GPU"):
        sample_space(tmp_path, baseline=..., search={"engine": "deepspeed", "precision": "fp16"})


def test_an_impossible_baseline_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpaceError, match=r"baseline: .*no multiple"):
        sample_space(tmp_path, baseline={"micro_batch_size": 5})


def test_deepspeed_keys_are_axes_where_they_apply(tmp_path: Path) -> None:
    keys = {BUCKET: [1000, 2000], PREFETCH: [500]}
    space = sample_space(tmp_path, search={"zero_stage": [0, 1, 3], "deepspeed": keys})
    found = {(config.engine, config.zero_stage, config.deepspeed) for config in space.candidates}
    assert {deepspeed for engine, _, deepspeed in found if engine == "pytorch"} == {()}
    assert {deepspeed for engine, stage, deepspeed in found if engine == "deepspeed" and stage == 0} == {()}
    assert {deepspeed for engine, stage, deepspeed in found if engine == "deepspeed" and stage == 1} == {
        ((BUCKET, 1000),),
        ((BUCKET, 2000),),
    }
    assert {deepspeed for engine, stage, deepspeed in found if engine == "deepspeed" and stage == 3} == {
        ((BUCKET, 1000), (PREFETCH, 500)),
        ((BUCKET, 2000), (PREFETCH, 500)),
    }


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("zero_optimization.reduce_buckt_size", 5, "reduce_buckt_size"),
        ("zero_optimization.reduce_bucket_size", "many", "reduce_bucket_size"),
        ("zero_optimization.stage", 2, "zero_stage"),
        ("train_micro_batch_size_per_gpu", 2, "micro_batch_size"),
        ("activation_checkpointing.enabled", True, "activation_checkpointing"),
    ],
)
def test_deepspeed_keys_are_checked_by_deepspeed(tmp_path: Path, key: str, value: object, words: str) -> None:
    with pytest.raises(InvalidSpaceError) as caught:
        sample_space(tmp_path, search={"engine": "deepspeed", "deepspeed": {key: [value]}})
    assert f"search.deepspeed.{key}" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cluster_must_be_known(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(space_text(cluster="auto"))
    with pytest.raises(InvalidSpaceError, match="auto"):
        load_space(path)
    gpus = ClusterSpec(nodes=1, gpus_per_node=2, gpu=find_gpu("H100-80GB"))
    assert load_space(path, gpus).cluster == gpus
    with pytest.raises(InvalidSpaceError, match=r"cluster\.memory_bytes"):
        sample_space(tmp_path, cluster={"gpus_per_node": 2, "gpu": "cpu"})


def test_identity_changes_with_the_work_and_not_with_axes_or_budget(tmp_path: Path) -> None:
    identity = sample_space(tmp_path).identity
    assert sample_space(tmp_path, search={"micro_batch_size": [1]}, budget={"trials": 99}).identity == identity
    assert sample_space(tmp_path, workload={"global_batch_size": 32, "sequence_length": 64}).identity != identity
    assert sample_space(tmp_path, measure={"micro_steps": 8}).identity != identity


def test_operators_are_not_watched_where_zero_3_gathers_again(tmp_path: Path) -> None:
    key = "zero_optimization.stage3_max_live_parameters"
    search = {"engine": "deepspeed", "zero_stage": [2, 3], "activation_checkpointing": ["full", "selective_ops"]}
    space = sample_space(tmp_path, search=search | {"deepspeed": {key: [1000, 1_000_000_000]}}, baseline=...)
    watched = {
        (c.zero_stage, dict(c.deepspeed).get(key))
        for c in space.candidates
        if c.activation_checkpointing == "selective_ops"
    }
    assert watched == {(2, None), (3, 1_000_000_000)}
    assert any("and keeps 1000; use full or selective" in reason for reason in space.illegal)


def test_a_second_partition_divides_the_ranks_of_zero_3(tmp_path: Path) -> None:
    key = "zero_optimization.zero_hpz_partition_size"
    search = {"engine": "deepspeed", "zero_stage": [2, 3], "deepspeed": {key: [1, 2, 3]}}
    cluster = {"nodes": 1, "gpus_per_node": 4, "gpu": "cpu", "memory_bytes": "60MiB"}
    space = sample_space(tmp_path, search=search, cluster=cluster, baseline=...)
    assert {(c.zero_stage, dict(c.deepspeed).get(key)) for c in space.candidates} == {(2, None), (3, 1), (3, 2)}
    assert f"{key} 3 does not divide gpus 4" in space.illegal
