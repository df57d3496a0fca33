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
from autotune.modeling.build import fill
from autotune.spec.model import ModelSpec

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""A file is closed when it has reached this size, as Hugging Face does."""

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors files."""
    return next(folder.glob("*.safetensors"), None) is not None


def load_weights(parameters: NamedParameters, folder: Path) -> None:
    """Set each parameter of this rank to the value of its name, in place. Ranks need not call it together.

    Args:
        parameters: by Hugging Face's names, whole or sharded.
        folder: of `save_pretrained` or a downloaded checkpoint.

    Raises:
        UsageError: the folder lacks a parameter, or has another shape of it.
    """
    files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    for name, parameter in parameters:
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
