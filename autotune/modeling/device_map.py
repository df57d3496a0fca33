"""Naive model parallelism: one process, layers in a row on each of its GPUs, which work one after another.

What transformers' `from_pretrained(…, device_map="auto")` does, by its functions and accelerate's own: which module is
on which GPU follows from the sizes of the weights as they are loaded, before there are adapters; hooks of accelerate
then bring what a module is called with to its GPU, and the model's outputs, logits included, back to the first one.
"""

import functools
import json
from collections.abc import Mapping

import torch
from accelerate import dispatch_model
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map
from transformers.quantizers import AutoHfQuantizer

from autotune.errors import UsageError
from autotune.formats.bitsandbytes_json import to_quantization_config
from autotune.modeling.build import COMPUTE_DTYPES, build_model
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec

LAYERS = "model.layers"
"""Where the families that have adapters keep their layers."""

ENOUGH_BYTES = 2**60
"""Taken to be free on each GPU. What is free decides only where weights do not fit: transformers would then leave some
of them on the host, and a trial runs out of memory."""


def balanced_map(model: ModelSpec, config: TrialConfig) -> dict[str, int]:
    """The GPU, from 0 on, of each module that is placed as a whole, by its name; together they are the model.

    The last GPUs may have none: all but the last may have 1.25 times the largest module more than an equal share, so
    that many of them have room for all layers before it comes to the last (transformers, integrations/accelerate.py).

    Raises:
        UsageError: all of the model is on one GPU. transformers' Trainer would then copy it to the others.
    """
    sizes = TrialConfig(  # what they depend on
        engine="pytorch",
        gpus=config.gpus,
        micro_batch_size=1,
        sequence_length=1,
        precision=config.precision,
        attention=config.attention,
        method=config.method,
    )
    placed = dict(_balanced(json.dumps(model.config, sort_keys=True), sizes))
    if len(set(placed.values())) == 1:
        raise UsageError(
            f"device_map auto leaves all of {model.name} on one of {config.gpus} GPUs; use device_map none"
        )
    return placed


@functools.lru_cache(maxsize=64)
def _balanced(model: str, config: TrialConfig) -> tuple[tuple[str, int], ...]:
    spec = ModelSpec(name="placed", config=json.loads(model))
    with unset_fake_temporarily():
        built = build_model(spec, config.attention)
        quantizer = None
        if config.method == "qlora":
            from autotune.modeling.quantized import replace_linear

            replace_linear(built, config)
            stated = BitsAndBytesConfig(**to_quantization_config(config))
            quantizer = AutoHfQuantizer.from_config(stated, pre_quantized=False)
        for parameter in built.parameters():
            if parameter.dtype == torch.float32:  # what is quantised has its own
                parameter.data = parameter.data.to(COMPUTE_DTYPES[config.precision])
        whole = set(built._no_split_modules or ())
        limits = get_balanced_memory(built, dict.fromkeys(range(config.gpus), ENOUGH_BYTES), whole, quantizer)
        if quantizer is not None:
            limits = quantizer.adjust_max_memory(limits)
        placed = infer_auto_device_map(built, limits, whole, hf_quantizer=quantizer)
    return tuple(placed.items())


def layers_of_gpus(placed: Mapping[str, int], layers: int, gpus: int) -> list[int]:
    """How many of the model's layers are on each GPU."""
    found = [0] * gpus
    for index in range(layers):
        found[gpu_of(f"{LAYERS}.{index}", placed)] += 1
    return found


def gpu_of(module: str, placed: Mapping[str, int]) -> int:
    """Where a module is: placed by its own name, or as part of another."""
    while module not in placed and module:
        module = module.rpartition(".")[0]
    return placed[module]


def shortened(placed: Mapping[str, int], gpu: int, layers: int, before: int) -> tuple[dict[str, int], int]:
    """The map of a shallower model, as one GPU sees it: all that is no layer stays where it is.

    Args:
        placed: from `balanced_map`.
        gpu: whose.
        layers: on that GPU; as many as all where the whole model's are there.
        before: layers on the GPU before it, if it has any; behind it is one layer, on the GPU of the last.

    Returns:
        The map, and how many layers it has.
    """
    own = {name: at for name, at in placed.items() if name.rpartition(".")[0] != LAYERS}
    homes = [at for name, at in placed.items() if name not in own]
    if not homes:
        return own, layers
    ahead = [at for at in homes if at < gpu][-1:] * before
    behind = [at for at in homes if at > gpu][-1:]
    short = [*ahead, *[gpu] * layers, *behind]
    return own | {f"{LAYERS}.{index}": at for index, at in enumerate(short)}, len(short)


def devices_of(config: TrialConfig, device: torch.device) -> list[torch.device]:
    """Those of the process, of which `device` is the first. A host's CPUs are one, which then has all the parts."""
    if device.type == "cpu":
        return [device] * config.gpus
    return [device, *(torch.device(device.type, at) for at in range(1, config.gpus))]


def spread(model: PreTrainedModel, placed: dict[str, torch.device], first: torch.device) -> None:
    """Have the modules of `model`, which are where `placed` says, called with what has been brought there, in place."""
    dispatch_model(
        model,
        placed,
        main_device=first,
        skip_keys=model._skip_keys_device_placement,
        force_hooks=True,  # on a CPU as well
    )
