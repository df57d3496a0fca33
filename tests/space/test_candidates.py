"""The columnar space is what enumerating every combination one by one would give."""

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.formats.targets import TARGETS
from autotune.space.candidates import ABSENT
from autotune.space.legality import rules
from autotune.space.space import NOT_APPLICABLE, Dropped, Space, load_space, stored_space
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import Scalar, TrialConfig
from autotune.spec.model import load_model
from autotune.spec.record import SpaceRecord, StudyRecord
from tests.samples import sample_space, space_text

MODEL = load_model("qwen3-tiny", Path())
CLUSTERS = (
    ClusterSpec(nodes=1, gpus_per_node=2, gpu=find_gpu("cpu"), memory_bytes=60 * 1024**2),
    ClusterSpec(nodes=2, gpus_per_node=4, gpu=find_gpu("H100-80GB")),
)


def combinations(space: Space) -> Iterator[TrialConfig]:
    """Every distinct config of the axes, legal or not, in their order."""
    seen: set[TrialConfig] = set()
    for combination in itertools.product(*space.axes.values()):
        config = space.config(dict(zip(space.axes, combination, strict=True)))
        if config not in seen:
            seen.add(config)
            yield config


def dropped(space: Space, refusals: dict[TrialConfig, str | None]) -> tuple[Dropped, ...]:
    """What `Space.dropped` is to say."""
    used: dict[str, set[Scalar]] = {axis: set() for axis in space.axes}
    for config in (config for config, reason in refusals.items() if reason is None):
        for axis, value in space.values(config).items():
            used[axis].add(value)
    reasons: dict[tuple[str, Scalar], Counter[str]] = {}
    for axis, values in space.axes.items():
        asked = axis.partition(".")[0] in space.file.search.model_fields_set
        if asked and not (axis == "selective_every" and used[axis] == {NOT_APPLICABLE}):
            reasons |= {(axis, value): Counter() for value in values if value not in used[axis]}
    for config, reason in refusals.items():
        for pair in space.values(config).items():
            if pair in reasons:
                reasons[pair][reason or ""] += 1
    nowhere = "it applies to none of the engines and stages listed"
    return tuple(Dropped(*pair, counts.most_common(1)[0][0] if counts else nowhere) for pair, counts in reasons.items())


def some(*values: Any) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=3, unique_by=lambda value: (type(value), value))


KEYS = st.dictionaries(
    st.sampled_from(
        [
            "zero_optimization.reduce_bucket_size", "zero_optimization.stage3_prefetch_bucket_size",
            "zero_optimization.sub_group_size", "communication_data_type", "zero_allow_untested_optimizer",
        ]
    ),
    some(1, True, 0, 500, 0.5, "fp32"),
    max_size=3,
)  # fmt: skip
SEARCHES = st.fixed_dictionaries(
    {"engine": some("deepspeed", "pytorch"), "micro_batch_size": some(1, 2, 3, 16), "zero_stage": some(0, 1, 2, 3)},
    optional={
        "gpus": some(1, 2, 3, 6, 8),
        "precision": some("bf16", "fp16", "fp32"),
        "offload": some("none", "optimizer", "optimizer+parameters"),
        "activation_checkpointing": some("none", "full", "selective"),
        "selective_every": some(2, 3, 99),
        "attention": some("sdpa", "eager", "flash_attention_2"),
        "deepspeed": KEYS,
    },
)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Small spaces, of which some have no legal candidate."""
    targets = draw(some(*TARGETS))
    length = draw(st.sampled_from([64, 64, 64, 10**6]))
    text = space_text(
        search=draw(SEARCHES),
        targets=targets,
        workload={"global_batch_size": 16, "sequence_length": length},
        baseline=...,
    )
    record = SpaceRecord(text=text, model=MODEL, cluster=draw(st.sampled_from(CLUSTERS)))
    now = datetime.now(UTC)
    return stored_space(StudyRecord(name="s", created_at=now, space=record, space_version=1, identity="i"))


@given(spaces())
@settings(max_examples=150, deadline=None)
def test_it_equals_the_enumeration(space: Space) -> None:
    refusals = {config: space.refusal(config) for config in combinations(space)}
    legal = [config for config, reason in refusals.items() if reason is None]
    assert list(space.candidates) == legal
    assert len(space.candidates) == len(legal)
    # In their order too: of two reasons that are equally common, the one seen first is told.
    assert list(space.illegal.items()) == list(Counter(r for r in refusals.values() if r is not None).items())
    assert space.dropped == dropped(space, refusals)


@given(spaces())
@settings(max_examples=50, deadline=None)
def test_columns_hold_the_values_of_the_candidates(space: Space) -> None:
    columns = {axis: (*space.axes[axis], NOT_APPLICABLE) for axis in space.columns}
    assert list(columns) == list(space.axes)
    for axis, values in columns.items():
        column = space.columns[axis]
        assert column.shape == (len(space.candidates),)
        assert [values[at] for at in column] == [space.values(config)[axis] for config in space.candidates]
        assert np.array_equal(space.columns.applies(axis), column != ABSENT)
        assert space.used(axis) == tuple(
            v for at, v in enumerate(values) if (at if v != NOT_APPLICABLE else -1) in column
        )


def test_candidates_are_a_sequence(tmp_path: Path) -> None:
    space = sample_space(tmp_path)
    listed = list(space.candidates)
    assert space.candidates[-1] == listed[-1]
    assert space.candidates[3:9:2] == tuple(listed[3:9:2])
    assert [space.candidates.index(config) for config in listed] == list(range(len(listed)))
    other = space.config(space.values(listed[0]) | {"selective_every": 2, "micro_batch_size": 3})
    assert listed[0] in space.candidates
    assert other not in space.candidates
    anything: object = "deepspeed"
    assert anything not in space.candidates
    with pytest.raises(ValueError, match="not among the candidates"):
        space.candidates.index(other)
    with pytest.raises(ValueError, match="not among the candidates"):
        space.candidates.index(listed[0], 1)
    with pytest.raises(IndexError):
        space.candidates[len(listed)]
    with pytest.raises(KeyError):
        space.columns["no_axis"]


@pytest.mark.parametrize("rule", rules(TARGETS[:1]) + rules(TARGETS[1:2])[-1:] + rules(TARGETS[2:])[-1:])
@pytest.mark.parametrize("cluster", CLUSTERS, ids=["cpu", "gpus"])
def test_a_rule_reads_nothing_that_it_does_not_declare(tmp_path: Path, rule: Any, cluster: ClusterSpec) -> None:
    keys = [name.removeprefix("deepspeed.") for name in rule.reads if name.startswith("deepspeed.")]
    names = [name for name in rule.reads if not name.startswith("deepspeed.")]
    assert set(names) <= {field.name for field in fields(TrialConfig)} - {"deepspeed"}
    search = {
        "precision": ["bf16", "fp16", "fp32"],
        "offload": ["none", "optimizer", "optimizer+parameters"],
        "activation_checkpointing": ["none", "selective"],
        "attention": ["sdpa", "flash_attention_2"],
        "micro_batch_size": [1, 3],
        "gpus": [1, 2, 99],
        "deepspeed": {"zero_optimization.zero_hpz_partition_size": [1, 2, 3]},
    }
    space = sample_space(tmp_path, search=search, baseline=...)
    asked = set()
    for config in combinations(space):
        partial: TrialConfig = object.__new__(TrialConfig)  # any other field of it raises AttributeError
        for name in names:
            object.__setattr__(partial, name, getattr(config, name))
        if keys:
            object.__setattr__(partial, "deepspeed", tuple(pair for pair in config.deepspeed if pair[0] in keys))
        asked.add(rule(partial, space.workload, MODEL, cluster) == rule(config, space.workload, MODEL, cluster))
    assert asked == {True}


def test_a_large_space_is_judged_without_making_its_configs(tmp_path: Path) -> None:
    sizes = [1000 * n for n in range(1, 61)]
    search = {
        "engine": ["deepspeed", "pytorch"],
        "precision": ["bf16", "fp32"],
        "activation_checkpointing": ["none", "full"],
        "micro_batch_size": [1, 2, 4, 8, 16],
        "deepspeed": {
            "zero_optimization.reduce_bucket_size": sizes,
            "zero_optimization.allgather_bucket_size": sizes,
            "zero_optimization.stage3_prefetch_bucket_size": [500, 1000],
        },
    }
    path = tmp_path / "space.yaml"
    path.write_text(space_text(search=search, baseline=...), encoding="utf-8")
    load_space(path)  # imports DeepSpeed, which is not measured
    tracemalloc.start()
    space = load_space(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # deepspeed: precision x checkpointing x micro-batch that divides x buckets by stage; pytorch: stages 0, 2, 3
    per_stage = 2 * 2 * 4
    assert len(space.candidates) == per_stage * (1 + 3600 + 3600 + 3600 * 2) + per_stage * 3 > 200_000
    assert sum(space.illegal.values()) == 2 * 2 * 1 * (1 + 3600 + 3600 + 7200) + 2 * 2 * (1 + 1 + 1) + per_stage + 4
    assert space.used("zero_stage") == (0, 1, 2, 3)
    assert [(d.axis, d.value) for d in space.dropped] == [("micro_batch_size", 16)]
    assert space.candidates.index(space.candidates[123_456]) == 123_456
    assert peak_bytes < 100 * len(space.candidates)
