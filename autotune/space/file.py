"""The search-space file: a YAML document, validated key by key."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from autotune.errors import InvalidSpaceError
from autotune.spec.config import ActivationCheckpointing, Attention, Engine, Offload, Precision, Scalar
from autotune.units import format_bytes, parse_bytes

MAX_FILE_BYTES = 1024 * 1024

T = TypeVar("T")


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


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


Number = Annotated[Scalar, BeforeValidator(_number)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClusterFile(_Strict):
    """The hardware, stated rather than asked of Ray."""

    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt
    gpu: str
    memory_bytes: Annotated[int, BeforeValidator(parse_bytes)] | None = None


class WorkloadFile(_Strict):
    """The work of one optimizer step."""

    global_batch_size: PositiveInt
    sequence_length: PositiveInt
    learning_rate: Annotated[float, BeforeValidator(_number), Field(gt=0)] = 1e-5
    weight_decay: Annotated[float, BeforeValidator(_number), Field(ge=0)] = 0.0
    max_gradient_norm: Annotated[float, BeforeValidator(_number), Field(gt=0)] = 1.0


class ObjectiveFile(_Strict):
    """What is made as large as possible."""

    maximize: Literal["tokens_per_second_per_gpu"] = "tokens_per_second_per_gpu"


class SearchFile(_Strict):
    """The axes."""

    engine: Axis[Engine] = ["deepspeed", "pytorch"]
    gpus: Axis[PositiveInt] | None = None
    precision: Axis[Precision] = ["bf16"]
    zero_stage: Axis[Annotated[int, Field(ge=0, le=3, strict=True)]] = [0, 1, 2, 3]
    offload: Axis[Offload] = ["none"]
    activation_checkpointing: Axis[ActivationCheckpointing] = ["none", "full"]
    selective_every: Axis[Annotated[int, Field(ge=2, strict=True)]] = [2]
    micro_batch_size: Axis[PositiveInt] = [1, 2, 4, 8, 16]
    attention: Axis[Attention] = ["sdpa"]
    deepspeed: dict[str, Axis[Number]] = {}


class BaselineFile(_Strict):
    """What the user runs today: measured first, and what gains are reported against."""

    engine: Engine | None = None
    gpus: PositiveInt | None = None
    precision: Precision | None = None
    zero_stage: Annotated[int, Field(ge=0, le=3, strict=True)] | None = None
    offload: Offload | None = None
    activation_checkpointing: ActivationCheckpointing | None = None
    selective_every: Annotated[int, Field(ge=2, strict=True)] | None = None
    micro_batch_size: PositiveInt | None = None
    attention: Attention | None = None
    deepspeed: dict[str, Number] = {}


class BudgetFile(_Strict):
    """When the study ends. Each limit is optional but the number of trials."""

    trials: PositiveInt
    minutes: Annotated[float, Field(gt=0)] | None = None
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    trial_seconds: Annotated[float, Field(gt=0)] = 600.0


class MeasureFile(_Strict):
    """How a trial measures."""

    warmup: PositiveInt = 1
    micro_steps: Annotated[int, Field(ge=2, strict=True)] = 6


class SpaceFile(_Strict):
    """The whole document."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    model: str
    weights: Literal["random"] = "random"
    task: Literal["train"] = "train"
    method: Literal["full"] = "full"
    cluster: Literal["auto"] | ClusterFile = "auto"
    workload: WorkloadFile
    objective: ObjectiveFile = ObjectiveFile()
    memory_headroom: Annotated[float, Field(ge=0, lt=1)] = 0.06
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
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InvalidSpaceError(
                f"{path}: found {format_bytes(size)}, but a search space is at most {format_bytes(MAX_FILE_BYTES)}"
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
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        raise InvalidSpaceError(f"{where}{line}: is not valid YAML ({problem})") from None
    if not isinstance(document, dict):
        raise InvalidSpaceError(f"{where}: found {type(document).__name__}, but a search space is a mapping of keys")
    try:
        return SpaceFile.model_validate(document)
    except ValidationError as error:
        raise InvalidSpaceError(f"{where}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    """The first complaint as one line: key, what was found, what is allowed."""
    # A union reports one complaint per member; the longest path is the member that the user meant.
    first = max(error.errors(), key=lambda item: (-_document_order(error, item), len(item["loc"])))
    names = [part for part in first["loc"] if isinstance(part, int) or not _is_union_label(str(part))]
    key = ".".join(str(part) for part in names) or "document"
    more = error.error_count() - 1
    others = f" ({more} more problem{'s' if more > 1 else ''} in this file)" if more else ""
    if first["type"] == "extra_forbidden":
        siblings = _siblings([str(part) for part in names])
        allowed = f"; allowed here: {', '.join(siblings)}" if siblings else ""
        return f"{key}: is not a key of a search space{allowed}{others}"
    if first["type"] == "missing":
        return f"{key}: is missing{others}"
    message = first["msg"].removeprefix("Value error, ")
    found = repr(first["input"])
    found = found if len(found) <= 80 else f"{found[:77]}..."
    return f"{key}: found {found}; {message[0].lower()}{message[1:]}{others}"


def _document_order(error: ValidationError, item: Any) -> int:
    top = str(item["loc"][0]) if item["loc"] else ""
    tops = [str(other["loc"][0]) if other["loc"] else "" for other in error.errors()]
    return tops.index(top)


def _is_union_label(part: str) -> bool:
    """Pydantic puts the tried union member into the path; users know no such key."""
    return "[" in part or part in {"ClusterFile", "bool", "int", "float", "str"}


_SECTIONS: dict[str, type[BaseModel]] = {
    "": SpaceFile,
    "cluster": ClusterFile,
    "workload": WorkloadFile,
    "objective": ObjectiveFile,
    "search": SearchFile,
    "baseline": BaselineFile,
    "budget": BudgetFile,
    "measure": MeasureFile,
}


def _siblings(names: list[str]) -> list[str]:
    """The keys that are allowed where the last of `names` stands."""
    section = _SECTIONS.get(".".join(names[:-1]))
    return list(section.model_fields) if section else []
