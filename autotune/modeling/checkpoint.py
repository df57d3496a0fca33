"""Weights of a model that is spread over ranks, from and to a folder of safetensors as `from_pretrained` reads it.

One parameter at a time exists whole, on every rank that shares it; a 32B model never does.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from autotune.errors import UsageError
from autotune.formats.peft_json import ADAPTER_FILE, to_adapter_config
from autotune.modeling.build import fill
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""A file is closed when it has reached this size, as Hugging Face does."""

_ADAPTER = ".lora_"
"""In the names of adapters alone."""
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors files."""
    return next(folder.glob("*.safetensors"), None) is not None


def load_weights(parameters: NamedParameters, folder: Path) -> None:
    """Set each parameter of this rank but adapters to the value of its name, in place. Ranks need not call it together.

    Args:
        parameters: by Hugging Face's names, whole or sharded.
        folder: of `save_pretrained` or a downloaded checkpoint.

    Raises:
        UsageError: the folder lacks a parameter, or has another shape of it.
    """
    files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    for name, parameter in parameters:
        if _ADAPTER in name:
            continue
        name = name.replace(".base_layer.", ".")
        if name not in files:
            raise UsageError(f"{folder}: has no weight {name}; name a folder with all the weights of this model")
        with safe_open(files[name], framework="pt") as stored:
            value: torch.Tensor = stored.get_tensor(name)
        if value.shape != parameter.shape:
            raise UsageError(
                f"{folder}: weight {name} is {tuple(value.shape)}, but the model's is {tuple(parameter.shape)};"
                " name the folder of the model whose config.json this is"
            )
        fill(parameter, value.to(parameter.device, parameter.dtype))


def save_adapters(
    parameters: NamedParameters, config: TrialConfig, base: str, folder: Path, *, writes: bool, dtype: torch.dtype
) -> None:
    """Write the adapters of all ranks as `peft.PeftModel.from_pretrained` reads them. Every rank calls it.

    Args:
        parameters: by Hugging Face's names, whole or sharded; those that are no adapters are left out.
        config: of a method with adapters.
        base: name or folder of the model that they belong to.
        folder: made where it is missing, by rank 0.
        writes: whether this rank stands for its stage; one of each stage does.
        dtype: of the file.
    """
    mine: dict[str, torch.Tensor] = {}
    for part in _parts(((name, p) for name, p in parameters if _ADAPTER in name), dtype):
        mine |= {f"base_model.model.{name.replace('.default.', '.')}": value for name, value in part.items()}
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.gather_object(mine if writes else {}, found if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value for of_rank in found for name, value in of_rank.items()}, folder / _ADAPTER_WEIGHTS)
        document = to_adapter_config(config) | {"base_model_name_or_path": base}
        (folder / ADAPTER_FILE).write_text(json.dumps(document, indent=2) + "\n")


def save_weights(
    parameters: NamedParameters, model: ModelSpec, folder: Path, *, stage: int, writes: bool, dtype: torch.dtype
) -> None:
    """Write the weights of all ranks, an index and config.json. Every rank calls it.

    Args:
        parameters: by Hugging Face's names, whole or sharded.
        model: for config.json.
        folder: made where it is missing; visible to all nodes, or else each has the files of its stages.
        stage: a number that ranks with other parameters do not have.
        writes: whether this rank writes its stage's files; one of each stage does.
        dtype: of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine: dict[str, str] = {}
    for number, part in enumerate(_parts(parameters, dtype)):
        if writes:
            name = f"model-{stage:03d}-{number:05d}.safetensors"
            save_file(part, folder / name, metadata={"format": "pt"})
            mine |= dict.fromkeys(part, name)
    found: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    if dist.get_rank() == 0:
        files = {name: file for of_rank in found for name, file in sorted(of_rank.items())}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=2) + "\n")
        (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


def _parts(parameters: NamedParameters, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """The whole weights on the host, as many at a time as one file holds."""
    part: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        part[name] = whole.to("cpu", dtype, copy=True).contiguous()
        if sum(tensor.nbytes for tensor in part.values()) >= SHARD_BYTES:
            yield part
            part = {}
    yield part


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())
