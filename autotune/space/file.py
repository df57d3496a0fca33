"""The search-space file: a YAML document, validated key by key."""

import difflib
import re
import shlex
import stat
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError

from autotune.errors import InvalidSpaceError, shown
from autotune.formats.targets import TARGETS, Target
from autotune.spec.config import (
    ActivationCheckpointing,
    Attention,
    Batching,
    DeviceMap,
    Engine,
    LoraTargets,
    Loss,
    Method,
    Offload,
    Optimizer,
    PipelineSchedule,
    Precision,
    Scalar,
)
from autotune.spec.script import Accumulation, Launch
from autotune.units import format_bytes, parse_bytes

MAX_FILE_BYTES = 64 * 1024
MAX_YAML_NODES = 100_000
"""A file of this size cannot have so many; aliases of aliases can."""
MAX_AXIS_VALUES = 1000
MAX_COUNT = 10**9
MAX_SIBLINGS = 8

T = TypeVar("T")


def _listed(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_AXIS_VALUES:
        raise ValueError(f"an axis has at most {MAX_AXIS_VALUES} values, not {len(values)}")
    return values


def _distinct(values: list[T]) -> list[T]:
    if not values:
        raise ValueError("an axis needs at least one value")
    # 1, 1.0 and True are equal in Python, but not in a config file.
    if len({(type(value), value) for value in values}) != len(values):
        raise ValueError("a value is listed twice")
    return values


Axis = Annotated[list[T], BeforeValidator(_listed), AfterValidator(_distinct)]
"""A list is an axis to search; a scalar is a fixed setting."""


def _number(value: Any) -> Any:
    """YAML 1.1 reads `5e8` as text; people mean the number. Whole floats become integers, as DeepSpeed wants them."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _printable(value: str) -> str:
    if not value or len(value) > 500 or not value.isprintable():
        raise ValueError("text is 1 to 500 printable characters on one line")
    return value


def _bounded(value: Scalar) -> Scalar:
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a whole number has at most 64 bits")
    return _printable(value) if isinstance(value, str) else value


Number = Annotated[Scalar, BeforeValidator(_number), AfterValidator(_bounded)]
Real = Annotated[float, BeforeValidator(_number), Field(strict=True)]
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT, strict=True)]
AtLeastTwo = Annotated[int, Field(ge=2, le=MAX_COUNT, strict=True)]
Name = Annotated[str, AfterValidator(_printable)]


def _absolute(value: str) -> str:
    if not Path(value).is_absolute():
        raise ValueError("a folder on each node begins with /")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClusterFile(_Strict):
    """The hardware, stated rather than asked of Ray."""

    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt
    gpu: Name
    memory_bytes: Annotated[int, BeforeValidator(parse_bytes)] | None = None


class NvmeFile(_Strict):
    """The fast disk of each node, for what `offload` names `_nvme`."""

    path: Annotated[Name, AfterValidator(_absolute)]
    free_bytes: Annotated[int, BeforeValidator(parse_bytes)] | None = None
    bandwidth_bytes_per_second: Annotated[Real, Field(gt=0)] | None = None


class LengthsFile(_Strict):
    """Lengths from a file beside this one: a number of tokens a line."""

    file: Name


class Lognormal(_Strict):
    """A lognormal distribution."""

    median: Annotated[Real, Field(ge=1, le=MAX_COUNT)]
    sigma: Annotated[Real, Field(gt=0, le=10)]


class LognormalFile(_Strict):
    """Lengths from a distribution."""

    lognormal: Lognormal


class WorkloadFile(_Strict):
    """The work of one optimizer step."""

    global_batch_size: PositiveInt
    sequence_length: PositiveInt
    learning_rate: Annotated[Real, Field(gt=0)] = 1e-5
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    max_gradient_norm: Annotated[Real, Field(gt=0)] = 1.0
    lengths: Literal["fixed"] | LengthsFile | LognormalFile = "fixed"
    """Of the data's sequences; `fixed`: all have `sequence_length` tokens."""


class ObjectiveFile(_Strict):
    """What the search is for."""

    maximize: Literal["tokens_per_second_per_gpu"] = "tokens_per_second_per_gpu"
    minimize: Literal["peak_device_used_bytes"] | None = None
    """Searched for besides: trials are then launched to widen the front of both, not to find the fastest alone."""


class LoraFile(_Strict):
    """The adapters of `method: lora` and `qlora`."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    target_modules: LoraTargets = "all-linear"


class NumericsFile(_Strict):
    """Axes that change what is trained, not only how fast: searched where they are stated, and labelled."""

    method: Axis[Method] | None = None
    lora_rank: Axis[PositiveInt] | None = None
    lora_target_modules: Axis[LoraTargets] | None = None
    optimizer: Axis[Optimizer] | None = None
    zero_quantized_weights: Axis[StrictBool] | None = None
    zero_quantized_gradients: Axis[StrictBool] | None = None
    fp8: Axis[StrictBool] | None = None


class SearchFile(_Strict):
    """The axes."""

    engine: Axis[Engine] = ["deepspeed", "pytorch"]
    gpus: Axis[PositiveInt] | None = None
    precision: Axis[Precision] = ["bf16"]
    zero_stage: Axis[Annotated[int, Field(ge=0, le=3, strict=True)]] = [0, 1, 2, 3]
    offload: Axis[Offload] = ["none"]
    activation_checkpointing: Axis[ActivationCheckpointing] = ["none", "full"]
    selective_every: Axis[AtLeastTwo] = [2]
    micro_batch_size: Axis[PositiveInt] = [1, 2, 4, 8, 16]
    attention: Axis[Attention] = ["sdpa"]
    tensor_parallel_size: Axis[PositiveInt] = [1]
    sequence_parallel_size: Axis[PositiveInt] = [1]
    pipeline_parallel_size: Axis[PositiveInt] = [1]
    pipeline_schedule: Axis[PipelineSchedule] = ["1f1b"]
    loss: Axis[Loss] = ["full_logits"]
    data_parallel_replicate_size: Axis[PositiveInt] = [1]
    torch_compile: Axis[Annotated[bool, Field(strict=True)]] = [False]
    use_liger_kernel: Axis[StrictBool] = [False]
    device_map: Axis[DeviceMap] = ["none"]
    tiled_mlp: Axis[StrictBool] = [False]
    numerics: NumericsFile = NumericsFile()
    batching: Axis[Batching] | None = None
    """By default `fixed` where lengths are, and `dynamic_padding` where they differ."""
    deepspeed: dict[Name, Axis[Number]] = {}
    script: dict[Name, Axis[Number]] = {}
    """Knobs of the user's own script, each a placeholder of its command."""


class BaselineFile(_Strict):
    """What the user runs today: measured first, and what gains are reported against."""

    engine: Engine | None = None
    gpus: PositiveInt | None = None
    precision: Precision | None = None
    zero_stage: Annotated[int, Field(ge=0, le=3, strict=True)] | None = None
    offload: Offload | None = None
    activation_checkpointing: ActivationCheckpointing | None = None
    selective_every: AtLeastTwo | None = None
    micro_batch_size: PositiveInt | None = None
    attention: Attention | None = None
    tensor_parallel_size: PositiveInt | None = None
    sequence_parallel_size: PositiveInt | None = None
    pipeline_parallel_size: PositiveInt | None = None
    pipeline_schedule: PipelineSchedule | None = None
    loss: Loss | None = None
    data_parallel_replicate_size: PositiveInt | None = None
    method: Method | None = None
    lora_rank: PositiveInt | None = None
    lora_target_modules: LoraTargets | None = None
    batching: Batching | None = None
    optimizer: Optimizer | None = None
    zero_quantized_weights: StrictBool | None = None
    zero_quantized_gradients: StrictBool | None = None
    torch_compile: Annotated[bool, Field(strict=True)] | None = None
    use_liger_kernel: StrictBool | None = None
    fp8: StrictBool | None = None
    device_map: DeviceMap | None = None
    tiled_mlp: StrictBool | None = None
    deepspeed: dict[Name, Number] = {}
    script: dict[Name, Number] = {}


def _words(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


def _variable(value: Any) -> Any:
    """YAML reads `1` and `true` as no text; a variable of the environment has nothing else."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


class ScriptSection(_Strict):
    """The user's own training script, which runs the candidates in our engines' place."""

    command: Annotated[list[Name], BeforeValidator(_words), Field(min_length=1)]
    """As a shell's words, or a list of them; no shell runs it. Placeholders stand for the candidate's values."""
    launch: Launch = "rank"
    accumulation: Accumulation = "short"
    environment: dict[Name, Annotated[str, BeforeValidator(_variable)]] = {}
    predict_as: Literal["engine"] | None = None
    """`engine`: the script is taken to need and to do what our engine of the same config does; without it nothing is
    predicted."""


class BudgetFile(_Strict):
    """When the study ends. Each limit is optional but the number of trials."""

    trials: PositiveInt
    minutes: Annotated[Real, Field(gt=0)] | None = None
    gpu_hours: Annotated[Real, Field(gt=0)] | None = None
    trial_seconds: Annotated[Real, Field(gt=0)] = 600.0
    stop_below_gain: Annotated[Real, Field(ge=0, lt=1)] = 0.001
    """The search ends when the best candidate left promises less than this, as a ratio of the best so far; 0: never."""
    stop_after: PositiveInt = 12
    """But not before so many trials are finished."""


class MeasureFile(_Strict):
    """How a trial measures."""

    warmup: PositiveInt = 1
    micro_steps: AtLeastTwo = 6
    confirm_top: Annotated[int, Field(ge=0, le=100, strict=True)] = 2
    """Finalists that run again against the baseline; 0: none is confirmed."""
    confirm_steps: AtLeastTwo = 30
    """Optimizer steps that count of each of them."""
    confirm_checkpoint: bool = True
    """Whether each saves a checkpoint once, which is deleted."""


class SpaceFile(_Strict):
    """The whole document."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    model: Name
    weights: Literal["random"] = "random"
    task: Literal["train"] = "train"
    method: Method = "full"
    lora: LoraFile = LoraFile()
    targets: Axis[Target] = list(TARGETS)
    """Who must be able to run the winner: a config is searched if at least one of them can express it. All of them
    together express every config that a trial can run; name the one that you use to search no other."""
    cluster: Literal["auto"] | ClusterFile = "auto"
    nvme: NvmeFile | None = None
    workload: WorkloadFile
    objective: ObjectiveFile = ObjectiveFile()
    memory_headroom: Annotated[Real, Field(ge=0, lt=1)] = 0.06
    price_per_gpu_hour: Annotated[Real, Field(gt=0)] | None = None
    """In any currency; reports then say what the study and its tokens cost."""
    script: ScriptSection | None = None
    search: SearchFile
    baseline: BaselineFile | None = None
    budget: BudgetFile
    measure: MeasureFile = MeasureFile()


def read_space_file(path: Path) -> tuple[SpaceFile, str]:
    """Read and validate a search-space file.

    Returns:
        The document, and its text as it stands on disk.

    Raises:
        InvalidSpaceError: the file is missing, unreadable, no YAML mapping, or some key is wrong.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # a pipe or a device may never end
            raise InvalidSpaceError(f"{path}: cannot be read (no regular file); name a search-space file")
        if found.st_size > MAX_FILE_BYTES:
            raise InvalidSpaceError(
                f"{path}: found {format_bytes(found.st_size)}, but a search space is at most"
                f" {format_bytes(MAX_FILE_BYTES)}"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidSpaceError(f"{path}: cannot be read ({error.strerror}); name a search-space file") from None
    except UnicodeDecodeError:
        raise InvalidSpaceError(f"{path}: is not UTF-8 text; name a search-space file in YAML") from None
    return parse_space(text, str(path)), text


def parse_space(text: str, where: str) -> SpaceFile:
    """Validate the text of a search-space file; `where` names it in errors.

    Raises:
        InvalidSpaceError: it is no YAML mapping, or some key is wrong.
    """
    try:
        document = _load_yaml(text)
    except RecursionError:
        raise InvalidSpaceError(f"{where}: is nested too deeply; a search space has three levels") from None
    except Exception as error:  # of PyYAML and, for a tag that does not fit its value, IndexError, KeyError and others
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:200] or type(error).__name__
        raise InvalidSpaceError(f"{where}{line}: is not valid YAML ({problem})") from None
    if not isinstance(document, dict):
        raise InvalidSpaceError(f"{where}: found {type(document).__name__}, but a search space is a mapping of keys")
    try:
        return SpaceFile.model_validate(document)
    except ValidationError as error:
        raise InvalidSpaceError(f"{where}: {_sentence(error)}") from None


def _load_yaml(text: str) -> Any:
    """`yaml.safe_load`, but a key stands once in its mapping, and aliases cannot multiply without bound."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _weigh(node: yaml.Node, weights: dict[int, int]) -> int:
    """How many nodes `node` has when its aliases are written out; `weights` holds those of nodes already weighed."""
    if id(node) in weights:
        return weights[id(node)]
    weights[id(node)] = MAX_YAML_NODES  # while it is weighed: an anchor that contains itself is endless
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {shown(key.value)} is given twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
    weights[id(node)] = weight = 1 + sum(_weigh(child, weights) for child in children)
    if weight > MAX_YAML_NODES:
        raise yaml.MarkedYAMLError(problem="aliases repeat too much", problem_mark=node.start_mark)
    return weight


def _sentence(error: ValidationError) -> str:
    """The first complaint as one line: key, what was found, what is allowed."""
    # A union reports one complaint per member; the longest path is the member that the user meant.
    complaints = error.errors(include_url=False)
    top = complaints[0]["loc"][:1]
    first = max((item for item in complaints if item["loc"][:1] == top), key=lambda item: len(item["loc"]))
    own = first["loc"][-1:] if first["type"] == "extra_forbidden" else ()  # as the user wrote it
    path = first["loc"][: len(first["loc"]) - len(own)]
    names = [part for part in path if isinstance(part, int) or not _is_union_label(str(part))] + [*own]
    key = ".".join(_name(part) for part in names) or "document"
    more = error.error_count() - 1
    others = f" ({more} more problem{'s' if more > 1 else ''} in this file)" if more else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: is not a key of a search space{_allowed([str(part) for part in names])}{others}"
    if first["type"] == "missing":
        return f"{key}: is missing{others}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: found {shown(first['input'])}; {message[0].lower()}{message[1:]}{others}"


def _allowed(names: list[str]) -> str:
    """What is allowed in place of an unknown key, or of many the nearest, so that the message stays a sentence."""
    siblings = _siblings(names)
    if not siblings:
        return ""
    if len(siblings) <= MAX_SIBLINGS:
        return f"; allowed here: {', '.join(siblings)}"
    nearest = difflib.get_close_matches(names[-1], siblings, n=MAX_SIBLINGS, cutoff=0.0)
    return f"; allowed here: {', '.join(nearest)} and {len(siblings) - len(nearest)} more"


def _name(part: int | str) -> str:
    """A key for people; what YAML lets people write as one is endless."""
    text = str(part)
    return text if len(text) <= 80 and text.isprintable() else shown(text)


def _is_union_label(part: str) -> bool:
    """Pydantic puts the tried union member into the path; users know no such key."""
    return "[" in part or part in {"ClusterFile", "LengthsFile", "LognormalFile", "bool", "int", "float", "str"}


_SECTIONS: dict[str, type[BaseModel]] = {
    "": SpaceFile,
    "cluster": ClusterFile,
    "nvme": NvmeFile,
    "workload": WorkloadFile,
    "objective": ObjectiveFile,
    "workload.lengths": LengthsFile,
    "script": ScriptSection,
    "lora": LoraFile,
    "search": SearchFile,
    "search.numerics": NumericsFile,
    "baseline": BaselineFile,
    "budget": BudgetFile,
    "measure": MeasureFile,
}


def _siblings(names: list[str]) -> list[str]:
    """The keys that are allowed where the last of `names` stands."""
    section = _SECTIONS.get(".".join(names[:-1]))
    return list(section.model_fields) if section else []
