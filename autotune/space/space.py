"""`Space`: the axes of a study, its legal candidates, and the way from axis values to configs and back."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from autotune.errors import (
    InvalidModelError,
    InvalidSpaceError,
    NothingFeasibleError,
    StoreError,
    UnknownHardwareError,
    shown,
)
from autotune.space.candidates import ABSENT, Candidates, Columns
from autotune.space.file import SpaceFile, parse_space, read_space_file
from autotune.space.grid import Grid
from autotune.space.legality import RULES, applies, rules
from autotune.space.lengths import read_lengths
from autotune.space.methods import LORA_FIELDS, contradiction
from autotune.space.rule import Rule
from autotune.space.script import check_script, script_rules, script_run
from autotune.spec.cluster import ClusterSpec, NvmeSpec, find_gpu
from autotune.spec.config import ZERO_QUANTIZED, Batching, Scalar, TrialConfig
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.record import SpaceRecord, StudyRecord
from autotune.spec.script import ScriptRun
from autotune.spec.workload import MeasureSettings, Workload

MAX_COMBINATIONS = 20_000_000
"""Each costs one to four bytes to judge, and four more where it is legal."""
MAX_JUDGED = 100_000
"""Combinations of the axes that one rule reads: it is asked about each in Python, at some 10 microseconds."""

NOT_APPLICABLE = "n/a"
"""Value of an axis that does nothing under the other axes' values."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A value of an axis that no legal candidate has."""

    axis: str
    value: Scalar
    reason: str


@dataclass(frozen=True)
class Space:
    """A study's search space on a known cluster. Build it with `load_space`."""

    file: SpaceFile
    text: str
    """The file as it stood on disk."""
    where: str
    """The file's name, for messages."""
    model: ModelSpec
    cluster: ClusterSpec
    workload: Workload
    axes: dict[str, tuple[Scalar, ...]] = field(repr=False)
    """Axis name to its values; a fixed setting has one. DeepSpeed keys are named `deepspeed.<key>`."""

    @property
    def name(self) -> str:
        """The study's name."""
        return self.file.study

    @property
    def measure(self) -> MeasureSettings:
        """How trials measure."""
        return MeasureSettings(warmup=self.file.measure.warmup, micro_steps=self.file.measure.micro_steps)

    @property
    def usable_bytes(self) -> float:
        """Device memory less the headroom that the file asks for."""
        return (1 - self.file.memory_headroom) * self.cluster.memory_bytes

    @property
    def identity(self) -> str:
        """Sixteen hex digits of everything that makes two measurements comparable: model, work, hardware, protocol.

        Axes and budgets are not part of it: a study may be widened and go on.
        """
        parts = {
            "model": self.model.digest,
            "weights": self.file.weights,
            "task": self.file.task,
            "method": self.file.method,
            "workload": self.file.workload.model_dump(exclude={"lengths"}),
            "cluster": [
                self.cluster.nodes,
                self.cluster.gpus_per_node,
                self.cluster.gpu.name,
                self.cluster.memory_bytes,
            ],
            "measure": self.file.measure.model_dump(include={"warmup", "micro_steps"}),
        }
        if self.workload.lengths:
            parts["lengths"] = self.workload.lengths
        if self.file.script is not None:
            parts["script"] = self.file.script.model_dump(exclude={"predict_as"})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def record(self) -> SpaceRecord:
        """What a store keeps of it; `stored_space` reads it back."""
        return SpaceRecord(text=self.text, model=self.model, cluster=self.cluster)

    def config(self, values: dict[str, Any]) -> TrialConfig:
        """The config that one value per axis describes. Axes that do not apply are left out of it."""
        fields = {key: value for key, value in values.items() if "." not in key}
        if fields["activation_checkpointing"] != "selective":
            fields["selective_every"] = None
        if fields["pipeline_parallel_size"] == 1:
            fields["pipeline_schedule"] = None
        if fields["method"] == "full":
            fields |= dict.fromkeys(LORA_FIELDS)
        config = TrialConfig(**fields, sequence_length=self.file.workload.sequence_length)
        keys = {key.removeprefix("deepspeed."): value for key, value in values.items() if key.startswith("deepspeed.")}
        applicable = ((key, value) for key, value in keys.items() if applies(f"deepspeed.{key}", config))
        knobs = ((key.removeprefix("script."), value) for key, value in values.items() if key.startswith("script."))
        return replace(config, deepspeed=tuple(applicable), script=tuple(knobs))

    def values(self, config: TrialConfig) -> dict[str, Scalar]:
        """The inverse of `config`: one value per axis, `NOT_APPLICABLE` where the config has none."""
        keys = {f"deepspeed.{key}": value for key, value in config.deepspeed}
        keys |= {f"script.{knob}": value for knob, value in config.script}
        found: dict[str, Scalar | None] = {
            axis: keys.get(axis) if "." in axis else getattr(config, axis) for axis in self.axes
        }
        return {axis: NOT_APPLICABLE if value is None else value for axis, value in found.items()}

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """What a candidate must satisfy; the first that does not gives the reason."""
        if self.file.script is not None:
            return (*RULES, *script_rules(self.file.script))
        return rules(tuple(self.file.targets))

    @property
    def script(self) -> ScriptRun | None:
        """The user's own script that runs the candidates; None where our engines do."""
        return script_run(self.file, Path(self.where).parent)

    def refusal(self, config: TrialConfig) -> str | None:
        """Why the config is illegal, or None when it is legal."""
        reasons = (rule(config, self.workload, self.model, self.cluster) for rule in self.rules)
        return next((reason for reason in reasons if reason is not None), None)

    def __contains__(self, config: TrialConfig) -> bool:
        """Whether the config is a legal candidate of these axes."""
        if "candidates" in vars(self):  # judged already
            return config in self.candidates
        values = self.values(config)
        if not all(values[axis] in (*allowed, NOT_APPLICABLE) for axis, allowed in self.axes.items()):
            return False
        same = self.config({a: self.axes[a][0] if v == NOT_APPLICABLE else v for a, v in values.items()})
        return same == config and self.refusal(config) is None

    @cached_property
    def grid(self) -> Grid:
        """Every combination of the axes with its verdict."""
        judges = [
            (rule.reads, partial(rule, workload=self.workload, model=self.model, cluster=self.cluster))
            for rule in self.rules
        ]
        return Grid.judged(self.axes, self.config, judges)

    @cached_property
    def candidates(self) -> Candidates:
        """Every legal candidate, in the order of the file."""
        return Candidates(self.grid, self.config, self.values)

    @property
    def columns(self) -> Columns:
        """The candidates as one array an axis, each (candidates,) and in their order: indexes into `axes[axis]`."""
        return self.candidates.columns

    @property
    def illegal(self) -> Counter[str]:
        """How many distinct combinations each reason refuses."""
        return self.grid.illegal

    def used(self, axis: str) -> tuple[Scalar, ...]:
        """The values of an axis that some candidate has, `NOT_APPLICABLE` last where some candidate has none."""
        return tuple(NOT_APPLICABLE if at == ABSENT else self.axes[axis][at] for at in self.columns.used(axis))

    @property
    def numerics(self) -> tuple[str, ...]:
        """The axes with a choice that change what is trained, not only how fast."""
        stated = type(self.file.search.numerics).model_fields
        return tuple(axis for axis in stated if len(set(self.used(axis)) - {NOT_APPLICABLE}) > 1)

    @cached_property
    def dropped(self) -> tuple[Dropped, ...]:
        """Values that the file lists but no legal candidate has, with the commonest reason."""
        found = []
        for axis, values in self.axes.items():
            stated = self.file.search.model_fields_set | self.file.search.numerics.model_fields_set
            if axis.partition(".")[0] not in stated:
                continue  # our own default, which nobody asked for
            used = self.used(axis)
            if axis in ("selective_every", "pipeline_schedule") and used == (NOT_APPLICABLE,):
                continue
            for at, value in enumerate(values):
                if value not in used:
                    reasons = self.grid.illegal_with(axis, at).most_common(1)
                    nowhere = "it applies to none of the engines and stages listed"
                    found.append(Dropped(axis, value, reasons[0][0] if reasons else nowhere))
        return tuple(found)

    @cached_property
    def baseline(self) -> TrialConfig | None:
        """What the user runs today; axes that the file's baseline leaves out take their first value."""
        given = self.file.baseline
        if given is None:
            return None
        plain = given.model_dump(exclude={"deepspeed", "script"})
        stated = {key: value for key, value in plain.items() if value is not None}
        keys = {f"deepspeed.{key}": value for key, value in given.deepspeed.items()}
        keys |= {f"script.{knob}": value for knob, value in given.script.items()}
        config = self.config({axis: values[0] for axis, values in self.axes.items()} | stated | keys)
        reason = self.refusal(config)
        if reason is not None:
            raise InvalidSpaceError(f"{self.where}: baseline: {reason}; change the baseline to one that can run")
        return config


def load_space(path: Path, cluster: ClusterSpec | None = None) -> Space:
    """Read a search-space file and check that it describes something that can run.

    Args:
        path: the YAML file.
        cluster: the hardware, for files that say `cluster: auto`; ignored by the others.

    Raises:
        InvalidSpaceError: the file is wrong, or its axes have too many combinations.
        InvalidModelError: the model cannot be found.
        UnknownHardwareError: the GPU is not in the table.
        NothingFeasibleError: no combination of the axes is legal.
    """
    file, text = read_space_file(path)
    where = str(path)
    with _naming(where):
        model = load_model(file.model, path.parent)
    if file.cluster == "auto":
        if cluster is None:
            raise InvalidSpaceError(
                f"{where}: cluster: found 'auto', which needs a cluster to ask; state nodes, gpus_per_node, gpu"
            )
    else:
        with _naming(where):
            gpu = find_gpu(file.cluster.gpu)
        memory_bytes = file.cluster.memory_bytes or gpu.memory_bytes
        if memory_bytes is None:
            raise InvalidSpaceError(
                f"{where}: cluster.memory_bytes: is missing; on gpu: cpu state each worker's limit, such as 900MiB"
            )
        cluster = ClusterSpec(
            nodes=file.cluster.nodes, gpus_per_node=file.cluster.gpus_per_node, gpu=gpu, memory_bytes=memory_bytes
        )
    if file.nvme is not None:
        cluster = replace(cluster, nvme=NvmeSpec(**file.nvme.model_dump(exclude_none=True)))
    problem = contradiction(file)
    if problem is not None:
        raise InvalidSpaceError(f"{where}: {problem}")
    space = _space(file, text, where, model, cluster, path.parent)
    check_script(file, {axis: len(values) for axis, values in space.axes.items()}, where, path.parent)
    _check_size(space)
    _check_deepspeed_keys(file, where)
    if not space.candidates:
        reason, count = space.illegal.most_common(1)[0]
        raise NothingFeasibleError(
            f"{where}: search: no combination of the axes is legal; most ({count}) are refused because {reason}"
        )
    _ = space.baseline
    return space


def stored_space(study: StudyRecord) -> Space:
    """The search space of a study as its store has it, checked when it was stored.

    Raises:
        StoreError: the study was stored before stores kept the model and the cluster.
        InvalidSpaceError: this version of Autotune does not read the file any more.
    """
    where = f"the stored space of study {study.name!r}"
    if study.space.model is None or study.space.cluster is None:
        raise StoreError(
            f"{where} has no model and cluster, which earlier versions did not store; run `autotune tune` with its file"
        )
    file = parse_space(study.space.text, where)
    return _space(file, study.space.text, where, study.space.model, study.space.cluster, None)


def _space(
    file: SpaceFile, text: str, where: str, model: ModelSpec, cluster: ClusterSpec, folder: Path | None
) -> Space:
    """`folder` has what the file names; None: nothing is read."""
    axes: dict[str, tuple[Scalar, ...]] = {
        key: tuple(getattr(file.search, key))
        for key in type(file.search).model_fields
        if key not in ("deepspeed", "script", "numerics", "gpus", "batching")
    }
    numerics, lora = file.search.numerics, file.lora
    axes["method"] = tuple(numerics.method or [file.method])
    axes["lora_rank"] = tuple(numerics.lora_rank or [lora.rank])
    axes["lora_alpha"] = (lora.alpha,)
    axes["lora_target_modules"] = tuple(numerics.lora_target_modules or [lora.target_modules])
    axes["optimizer"] = tuple(numerics.optimizer or ["adamw"])
    axes |= {axis: tuple(getattr(numerics, axis) or [False]) for axis in (*ZERO_QUANTIZED, "fp8")}
    batching: tuple[Batching, ...] = ("dynamic_padding" if file.workload.lengths != "fixed" else "fixed",)
    axes["batching"] = batching if file.search.batching is None else tuple(file.search.batching)
    axes["gpus"] = tuple(file.search.gpus or [cluster.total_gpus])
    if "selective" not in axes["activation_checkpointing"] and "selective_every" not in file.search.model_fields_set:
        axes["selective_every"] = axes["selective_every"][:1]
    # To DeepSpeed 1 and true may differ; configs that differ in nothing else are equal, so one of them is enough.
    axes |= {f"deepspeed.{key}": tuple(dict.fromkeys(values)) for key, values in file.search.deepspeed.items()}
    axes |= {f"script.{knob}": tuple(dict.fromkeys(values)) for knob, values in file.search.script.items()}
    lengths = read_lengths(file.workload, folder, where) if folder is not None else ()
    workload = Workload(**file.workload.model_dump(exclude={"sequence_length", "lengths"}), lengths=lengths)
    return Space(file=file, text=text, where=where, model=model, cluster=cluster, workload=workload, axes=axes)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Say which file names the model or the GPU that is refused."""
    try:
        yield
    except (InvalidModelError, UnknownHardwareError) as error:
        raise type(error)(f"{where}: {error}") from error


def _check_size(space: Space) -> None:
    _check_combinations(space, space.axes, MAX_COMBINATIONS)
    for rule in space.rules:
        _check_combinations(space, space.axes.keys() & set(rule.reads), MAX_JUDGED)


def _check_combinations(space: Space, axes: Iterable[str], limit: int) -> None:
    sizes = {axis: len(space.axes[axis]) for axis in space.axes if axis in axes}
    combinations = math.prod(sizes.values())
    if combinations > limit:
        longest = sorted(sizes, key=lambda axis: sizes[axis], reverse=True)[:3]
        searched = [axis for axis in sizes if sizes[axis] > 1]
        which = "the axes" if len(sizes) == len(space.axes) else " x ".join(searched)
        count = f"{combinations:,}" if combinations < 10**15 else "more than a quadrillion"
        raise InvalidSpaceError(
            f"{space.where}: search: {which} have {count} combinations, but at most {limit:,} are searched;"
            f" shorten {', '.join(f'{axis[:80]} ({sizes[axis]} values)' for axis in longest if sizes[axis] > 1)}"
        )


def _check_deepspeed_keys(file: SpaceFile, where: str) -> None:
    # DeepSpeed is heavy: it is asked only when the file names keys of it.
    stated = [
        (f"search.deepspeed.{key}", key, value) for key, values in file.search.deepspeed.items() for value in values
    ]
    if file.baseline is not None:
        stated += [(f"baseline.deepspeed.{key}", key, value) for key, value in file.baseline.deepspeed.items()]
    if not stated:
        return
    from autotune.formats.deepspeed_json import deepspeed_key_error

    for place, key, value in stated:
        reason = deepspeed_key_error(key, value)
        if reason is not None:
            raise InvalidSpaceError(f"{where}: {place[:120]}: found {shown(value)}; {reason[:300]}")
