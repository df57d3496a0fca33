"""Cases: JSON in, predictions out. What `autotune predict` answers, and what benchmarks ask."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from autotune.errors import AutotuneError, UsageError, shown
from autotune.predict.generate import GENERATE_PROFILES, GenerateConfig, KvCache, Quantization, predict_generate
from autotune.predict.layout_times import STEP_PROFILES, Layouts, predict_layouts
from autotune.predict.layouts import TRAINER_PROFILES, Layout, impossible, predict_layout
from autotune.predict.shape import DecoderShape, read_shape
from autotune.predict.step import TimePrediction
from autotune.predict.throughput import predict_trials
from autotune.predict.trials import Trials
from autotune.space.legality import RULES
from autotune.space.methods import METHOD_RULES
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import (
    ActivationCheckpointing,
    Attention,
    DeviceMap,
    Engine,
    LoraTargets,
    Method,
    Offload,
    Precision,
    Scalar,
    TrialConfig,
)
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.prediction import MemoryPrediction
from autotune.spec.workload import Workload

MEMORY_HEADROOM = 0.06
"""A ratio: what `fits` leaves free, as a study does by default."""
MAX_FILE_BYTES = 1024**3

Count = Annotated[int, Field(ge=1, le=10**9, strict=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Cluster(_Strict):
    gpu: str
    nodes: Count = 1
    gpus_per_node: Count = 1
    memory_bytes: Annotated[int, Field(ge=0)] = 0


class _Workload(_Strict):
    sequence_length: Count
    global_batch_size: Count | None = None


class _Case(_Strict):
    """One line of a cases file."""

    id: str | int
    model: str | dict[str, Any]
    cluster: _Cluster
    task: Literal["train", "generate"] = "train"
    method: Method = "full"
    lora: dict[str, Any] | None = None
    workload: _Workload | None = None
    config: dict[str, Any]
    implementation: str = "transformers"


class _Generate(_Strict):
    batch_size: Count = 1
    prompt_tokens: Count
    new_tokens: Count
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    quantization: Quantization = "none"
    kv_cache: KvCache = "dynamic"


class _Layout(_Strict):
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1
    data_parallel_size: Count | None = None
    zero_stage: Literal[0, 1] = 0
    micro_batch_size: Count
    gradient_accumulation_steps: Count | None = None
    precision: Literal["bf16"] = "bf16"
    activation_checkpointing: Literal["none", "full"] = "none"


class _Trial(_Strict):
    engine: Engine
    gpus: Count | None = None
    micro_batch_size: Count
    precision: Precision = "bf16"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    offload: Offload = "none"
    activation_checkpointing: ActivationCheckpointing = "none"
    selective_every: Count | None = None
    attention: Attention = "sdpa"
    device_map: DeviceMap = "none"
    tiled_mlp: bool = False
    deepspeed: dict[str, Scalar] = {}


class _Lora(_Strict):
    rank: Count = 16
    alpha: Count = 32
    target_modules: LoraTargets = "all-linear"


_CASE = TypeAdapter(_Case)
_GENERATE = TypeAdapter(_Generate)
_LAYOUT = TypeAdapter(_Layout)
_TRIAL = TypeAdapter(_Trial)
_LORA = TypeAdapter(_Lora)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What one case came to."""

    fullest: MemoryPrediction
    allocated_bytes_of_all: int | None = None
    """Sum over the GPUs of a model that is spread by layers; None where all GPUs do the same."""
    rank_0_reserved_bytes: int | None = None
    """Of the first pipeline stage; None where there are no stages."""
    time: TimePrediction | None = None
    """None for generation, and on a CPU, of whose speed the table of hardware says nothing."""
    trial: tuple[TrialConfig, Workload, str] | None = None
    """Whose time is still to be predicted, together with that of others."""


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object a line; empty lines are skipped.

    Raises:
        UsageError: the file cannot be read, or a line is no JSON object; the message has its number.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: more than {MAX_FILE_BYTES} bytes; split it into several files")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); name a file with one JSON object a line"
        ) from None
    cases = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            case = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: bad JSON and bad UTF-8 alike
            raise UsageError(f"{path}, line {number}: is not JSON ({error}); write one object a line") from None
        if not isinstance(case, dict):
            raise UsageError(f"{path}, line {number}: found {shown(case)}, but each line is one JSON object")
        cases.append(case)
    return cases


def answer(case: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction of one case as JSON data, or `{"id", "error"}` with one sentence where there is none."""
    return answers([case])[0]


def answers(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The predictions of cases, in their order; each as `answer` gives it. Times of one model are found together."""
    found = [_found(case) for case in cases]
    together: dict[tuple[ClusterSpec, Workload, str], list[int]] = {}
    for at, (case_found, cluster) in enumerate(found):
        if isinstance(case_found, _Answer) and case_found.trial is not None and cluster is not None:
            _, work, model = case_found.trial
            together.setdefault((cluster, work, model), []).append(at)
    times: dict[int, TimePrediction | AutotuneError | None] = {}
    for (cluster, work, model), those in together.items():
        configs = [trial[0] for at in those if (trial := _trial_of(found[at][0])) is not None]
        try:
            times |= dict(zip(those, _trial_times(_shape_of(model), configs, work, cluster), strict=True))
        except AutotuneError:  # of one of them: each by itself says which
            for at, config in zip(those, configs, strict=True):
                try:
                    times[at] = _trial_times(_shape_of(model), [config], work, cluster)[0]
                except AutotuneError as error:
                    times[at] = error
    documents = []
    for at, (case, (case_found, cluster)) in enumerate(zip(cases, found, strict=True)):
        time = case_found if isinstance(case_found, AutotuneError) else times.get(at)
        if isinstance(time, AutotuneError):
            documents.append({"id": case.get("id"), "error": str(time)})
        elif isinstance(case_found, _Answer) and cluster is not None:
            timed = case_found if case_found.trial is None else replace(case_found, time=time)
            documents.append(_document(case.get("id"), timed, cluster))
    return documents


def _trial_of(found: "_Answer | AutotuneError") -> tuple[TrialConfig, Workload, str] | None:
    return found.trial if isinstance(found, _Answer) else None


def _found(case: Mapping[str, Any]) -> tuple["_Answer | AutotuneError", ClusterSpec | None]:
    try:
        parsed = _parse(_CASE, case, "case")
        cluster = _cluster(parsed.cluster)
        if parsed.task == "generate":
            return _answer_generate(parsed, cluster), cluster
        if parsed.implementation in TRAINER_PROFILES:
            return _answer_layout(parsed, cluster), cluster
        return _answer_trial(parsed, cluster), cluster
    except AutotuneError as error:
        return error, None


def _document(identity: object, found: _Answer, cluster: ClusterSpec) -> dict[str, Any]:
    fullest = found.fullest
    usable = (1 - MEMORY_HEADROOM) * cluster.memory_bytes
    document: dict[str, Any] = {
        "id": identity,
        "fits": fullest.device_used_bytes <= usable,
        "fit_probability": round(fullest.fit_probability(usable), 4),
        "peak_memory_bytes": fullest.device_used_bytes,
        "peak_memory_kind": "device used, fullest GPU",
        "breakdown": {part.value: size for part, size in fullest.breakdown.items()},
        "peak_memory_allocated_bytes": fullest.allocated_bytes,
        "peak_memory_reserved_bytes": fullest.reserved_bytes,
        "step_time_seconds": found.time and _digits(found.time.step_time_seconds),
        "tokens_per_second_per_gpu": found.time and _digits(found.time.tokens_per_second_per_gpu),
        "model_flops_utilization": found.time and _digits(found.time.model_flops_utilization),
    }
    if fullest.layers_of_gpus:
        document |= {"gpu": fullest.gpu, "layers_of_gpus": list(fullest.layers_of_gpus)}
    if found.time is not None:
        document["step_time_breakdown"] = {part.value: _digits(size) for part, size in found.time.breakdown.items()}
    if found.allocated_bytes_of_all is not None:
        document["peak_memory_allocated_bytes_of_all_gpus"] = found.allocated_bytes_of_all
    if found.rank_0_reserved_bytes is not None:
        document["rank_0_peak_memory_reserved_bytes"] = found.rank_0_reserved_bytes
    return document


def _digits(value: float) -> float:
    """Six digits: more would pretend."""
    return float(f"{value:.6g}")


def _answer_generate(case: _Case, cluster: ClusterSpec) -> _Answer:
    profile = GENERATE_PROFILES.get(case.implementation)
    if profile is None:
        raise UsageError(_unknown_implementation(case.implementation, "generate", GENERATE_PROFILES))
    _refuse_unused(case, "workload", "lora")
    shape = _shape(case.model)
    config = GenerateConfig(**_parse(_GENERATE, case.config, "config").__dict__)
    stages = predict_generate(shape, config, profile, cluster.gpu.name, cluster.total_gpus)
    return _Answer(
        fullest=max(stages, key=lambda stage: stage.device_used_bytes),
        allocated_bytes_of_all=sum(stage.allocated_bytes for stage in stages),
    )


def _answer_layout(case: _Case, cluster: ClusterSpec) -> _Answer:
    _full_method(case)
    shape, profile = _shape(case.model), TRAINER_PROFILES[case.implementation]
    given, workload = _parse(_LAYOUT, case.config, "config"), _workload(case)
    model_parallel = given.tensor_parallel_size * given.pipeline_parallel_size
    replicas, rest = divmod(cluster.total_gpus, model_parallel)
    if rest or not replicas or given.data_parallel_size not in (None, replicas):
        raise UsageError(
            f"config: tensor_parallel_size {given.tensor_parallel_size} x pipeline_parallel_size"
            f" {given.pipeline_parallel_size} x data_parallel_size {given.data_parallel_size or 'n'} is not the"
            f" cluster's {cluster.total_gpus} GPUs; correct one of them"
        )
    steps = given.gradient_accumulation_steps
    if workload.global_batch_size is not None:
        steps, rest = divmod(workload.global_batch_size, given.micro_batch_size * replicas)
        if rest or not steps or given.gradient_accumulation_steps not in (None, steps):
            raise UsageError(
                f"workload: global_batch_size {workload.global_batch_size} is not micro_batch_size"
                f" {given.micro_batch_size} x data_parallel_size {replicas} x gradient_accumulation_steps"
                f" {given.gradient_accumulation_steps or 'n'}; correct one of them"
            )
    if steps is None:
        raise UsageError("workload: global_batch_size is missing; give it, or config.gradient_accumulation_steps")
    layout = Layout(
        tensor_parallel_size=given.tensor_parallel_size,
        pipeline_parallel_size=given.pipeline_parallel_size,
        data_parallel_size=replicas,
        zero_stage=given.zero_stage,
        micro_batch_size=given.micro_batch_size,
        gradient_accumulation_steps=steps,
        sequence_length=workload.sequence_length,
        gpus_per_node=cluster.gpus_per_node,
        activation_checkpointing=given.activation_checkpointing,
    )
    reason = impossible(shape, layout, profile)
    if reason is not None:
        raise UsageError(f"config: {reason}; choose another layout")
    stages = predict_layout(shape, layout, profile, cluster.gpu.name)
    return _Answer(
        fullest=max(stages, key=lambda stage: stage.device_used_bytes),
        rank_0_reserved_bytes=stages[0].reserved_bytes,
        time=_layout_time(case.implementation, shape, layout, cluster),
    )


def _layout_time(
    implementation: str, shape: DecoderShape, layout: Layout, cluster: ClusterSpec
) -> TimePrediction | None:
    if cluster.device == "cpu":
        return None
    by_cost = TRAINER_PROFILES[implementation].balances_by_cost
    profile, layouts = STEP_PROFILES[implementation], Layouts.of([layout])
    return predict_layouts(shape, layouts, profile, cluster, by_cost=by_cost).at(0)


def _trial_times(
    shape: DecoderShape, configs: list[TrialConfig], work: Workload, cluster: ClusterSpec
) -> list[TimePrediction | None]:
    if cluster.device == "cpu":
        return [None] * len(configs)
    times = predict_trials(shape, Trials.of(configs, work, shape), cluster)
    return [times.at(at) for at in range(len(configs))]


def _answer_trial(case: _Case, cluster: ClusterSpec) -> _Answer:
    if case.implementation != "transformers":
        raise UsageError(_unknown_implementation(case.implementation, "train", {"transformers", *TRAINER_PROFILES}))
    model = _model(case.model)
    given, workload = _parse(_TRIAL, case.config, "config"), _workload(case)
    if workload.global_batch_size is None:
        raise UsageError("workload: global_batch_size is missing; give the sequences of one optimizer step")
    fields = (
        given.__dict__
        | _method(case)
        | {"deepspeed": tuple(given.deepspeed.items()), "gpus": given.gpus or cluster.total_gpus}
    )
    config = TrialConfig(**fields, sequence_length=workload.sequence_length)
    work = Workload(global_batch_size=workload.global_batch_size)
    for rule in (*RULES, *METHOD_RULES):
        reason = rule(config, work, model, cluster)
        if reason is not None:
            raise UsageError(f"config: {reason}; choose another value")
    from autotune.predict.memory import predict_memory  # imports torch and transformers: only where it is asked

    return _Answer(
        fullest=predict_memory(config, model, work, cluster),
        trial=(config, work, _key(case.model)),
    )


def _method(case: _Case) -> dict[str, Any]:
    """The fields of what trains."""
    if case.method == "full":
        _refuse_unused(case, "lora")
        return {}
    lora = _parse(_LORA, case.lora or {}, "lora")
    return {"method": case.method} | {f"lora_{key}": value for key, value in lora.__dict__.items()}


def _full_method(case: _Case) -> None:
    if case.method != "full":
        raise UsageError(
            f"method: found {case.method}, but of implementation {case.implementation} only full is predicted;"
            " leave the case out"
        )
    _refuse_unused(case, "lora")


def _refuse_unused(case: _Case, *keys: str) -> None:
    for key in keys:
        if getattr(case, key) is not None:
            raise UsageError(f"{key}: means nothing to task {case.task} with method {case.method}; leave it out")


def _workload(case: _Case) -> _Workload:
    if case.workload is None:
        raise UsageError("workload: is missing; give sequence_length and global_batch_size")
    return case.workload


def _unknown_implementation(name: str, task: str, known: Any) -> str:
    return f"implementation: found {shown(name)}, but task {task} has {', '.join(sorted(known))}; use one of them"


@functools.lru_cache(maxsize=1024)
def _cluster(given: _Cluster) -> ClusterSpec:
    return ClusterSpec(
        nodes=given.nodes,
        gpus_per_node=given.gpus_per_node,
        gpu=find_gpu(given.gpu),
        memory_bytes=given.memory_bytes,
    )


def _shape(model: str | dict[str, Any]) -> DecoderShape:
    return _shape_of(_key(model))


def _model(model: str | dict[str, Any]) -> ModelSpec:
    return _model_of(_key(model))


def _key(model: str | dict[str, Any]) -> str:
    """Names and configs as one kind of cache key: a JSON text starts with a brace, a name does not."""
    return model if isinstance(model, str) else json.dumps(model, sort_keys=True)


@functools.lru_cache(maxsize=1024)
def _shape_of(key: str) -> DecoderShape:
    if not key.startswith("{"):
        return read_shape(key, load_model(key, Path.cwd()).config)
    return read_shape("of the case", json.loads(key))


@functools.lru_cache(maxsize=1024)
def _model_of(key: str) -> ModelSpec:
    if not key.startswith("{"):
        return load_model(key, Path.cwd())
    model = ModelSpec(name="of the case", config=json.loads(key))
    _ = (model.num_parameters, model.max_position_embeddings)
    return model


def _parse(adapter: TypeAdapter[Any], given: Any, where: str) -> Any:
    try:
        return adapter.validate_python(given if isinstance(given, dict) else dict(given))
    except ValidationError as error:
        raise UsageError(_sentence(error, where)) from None


def _sentence(error: ValidationError, where: str) -> str:
    """The first complaint as one line: key, what was found, what is allowed."""
    first = error.errors(include_url=False)[0]
    path = [part for part in first["loc"] if part not in ("str", "int", "bool", "float", "dict[str,any]")]
    key = ".".join(str(part) for part in (path if where == "case" else [where, *path]))
    if first["type"] == "extra_forbidden":
        return f"{shown(key)[1:-1]}: is not a key of a case here; take it out"
    if first["type"] == "missing":
        return f"{key}: is missing; give it"
    message = first["msg"]
    return f"{shown(key)[1:-1]}: found {shown(first['input'])}; {message[0].lower()}{message[1:]}"
