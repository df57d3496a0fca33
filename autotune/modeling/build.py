"""The Hugging Face model of a trial: built on meta, laid out as the config says, then given weights on its device.

The order is `build_model`, `apply_method`, `apply_activation_checkpointing`, `apply_compilation`, `shard_with_fsdp2`
where the config shards, `materialize`. No step before the last allocates a parameter, so a 32B model never exists whole
on the host, and under FSDP2 on no device either.
"""

import functools
import hashlib
import operator
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils.ao import convert_model_to_fp8_ao
from accelerate.utils.other import compile_regions_fsdp2
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from autotune.errors import UsageError
from autotune.spec.config import KEPT_OPERATORS, Attention, TrialConfig
from autotune.spec.model import ModelSpec

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The dtype in which matrix products run, by `TrialConfig.precision`."""


def huggingface_config(spec: ModelSpec) -> PretrainedConfig:
    """The transformers config of `spec`, without a key-value cache: training has no use for one."""
    fields = dict(spec.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.use_cache = False
    return config


def construct_model(spec: ModelSpec, attention: Attention) -> PreTrainedModel:
    """The causal language model with fp32 parameters, in training mode, wherever the surrounding context puts it.

    Its parameters have no values yet: `write_initial_weights` gives them. Buffers have theirs.

    Experts are computed by transformers' default, `grouped_mm`, as under the Trainer: tokens are sorted by expert, so
    that no size depends on which token goes to which.

    Raises:
        UsageError: transformers does not build this architecture with this attention, as Gemma 2 with `sdpa`.
    """
    config = huggingface_config(spec)
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise UsageError(f"model {spec.name} cannot be built with attention {attention}: {reason}") from error
    model.tie_weights()  # which is part of the initialisation
    return model.train()


def build_model(spec: ModelSpec, attention: Attention) -> PreTrainedModel:
    """`construct_model` with its parameters on the meta device.

    Buffers are real: those that no checkpoint stores (the rotary `inv_freq`) are computed by the constructors, and
    moving them through meta would lose them. They are a few KiB.
    """
    # Where tensors are fake (`autotune.predict.fake`), one on meta would be fake as well, and could not be replaced.
    with unset_fake_temporarily(), init_empty_weights(include_buffers=False):
        model = construct_model(spec, attention)
    model.tie_weights()  # moving each parameter to meta gave each user of a shared one its own
    return model


def apply_activation_checkpointing(model: PreTrainedModel, config: TrialConfig) -> None:
    """Recompute decoder layers in the backward pass: all of them, every n-th, or all but `KEPT_OPERATORS`.

    Goes through transformers' own switch, as the Hugging Face Trainer does. Non-reentrant: the reentrant kind needs
    inputs that require gradients and hides its saved tensors from hooks.

    Raises:
        UsageError: `selective` without `selective_every`.
    """
    if config.activation_checkpointing == "none":
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if config.activation_checkpointing == "selective_ops":
        kept = [operator.attrgetter(name)(torch.ops) for name in KEPT_OPERATORS]
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, kept)
    with warnings.catch_warnings():
        # The name that replaces it does not exist in the older transformers 5 that we support.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*", category=FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if config.activation_checkpointing == "selective":
        every = config.selective_every
        if not every:
            raise UsageError("activation_checkpointing selective needs selective_every, the n of every n-th layer")
        for index, layer in enumerate(checkpointed_layers(model)):
            layer.gradient_checkpointing = index % every == 0


def apply_compilation(model: PreTrainedModel, config: TrialConfig) -> None:
    """Have the layers of `model`, and the modules around them, compiled by themselves when they first run, in place.

    Behind `apply_activation_checkpointing` and before sharding, as accelerate does it: layers are checkpointed and
    gathered around what is compiled.
    """
    if config.torch_compile:
        compile_regions_fsdp2(model, dynamic=False)


def apply_liger_kernel(model: PreTrainedModel, config: TrialConfig) -> None:
    """Have Liger's kernels compute norms, rotary embeddings, SwiGLU and the loss of `model`, in place, by the Trainer's
    own function; rotary embeddings of every model of that kind in this process besides.
    """
    if config.use_liger_kernel:
        from transformers.integrations import liger  # brings PEFT and bitsandbytes, which asks for GPUs

        liger.apply_liger_kernel(model, None)


def apply_fp8(model: PreTrainedModel, config: TrialConfig, device: torch.device) -> None:
    """Have the linear modules of `model`, all but the first and the last, multiply in fp8, in place, by accelerate's
    own function; without a GPU by casts to fp8 and products of what they leave, which torchao calls emulation.
    """
    if not config.fp8:
        return
    from torchao.float8 import Float8LinearConfig  # asks for GPUs, which only a rank may

    convert_model_to_fp8_ao(model, config=Float8LinearConfig(emulate=device.type == "cpu"))


def loss_alone(config: TrialConfig) -> dict[str, bool]:
    """What a model is told besides: in an evaluation Liger's makes whole logits otherwise. The Trainer tells it too."""
    return {"skip_logits": True} if config.use_liger_kernel else {}


def apply_method(model: PreTrainedModel, config: TrialConfig) -> None:
    """Freeze what `config.method` does not train and add what it trains instead, in place."""
    if config.method == "full":
        return
    from autotune.modeling.lora import add_adapters  # PEFT and bitsandbytes take seconds to import

    if config.method == "qlora":
        from autotune.modeling.quantized import replace_linear

        replace_linear(model, config)
    add_adapters(model, config)


def checkpointed_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """The repeated blocks of `model`, in order: the unit of checkpointing and of FSDP2."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def layer_kinds(spec: ModelSpec, attention: Attention) -> list[object]:
    """Of each decoder layer something that is equal for layers built alike: same parameters, same attention pattern.

    Layers differ where a model alternates sliding and full attention, or layers with experts and without.
    """
    model = build_model(spec, attention)
    layers = checkpointed_layers(model)
    patterns = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    return [
        (pattern, tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()))
        for pattern, layer in zip(patterns, layers, strict=True)
    ]


def shard_with_fsdp2(model: PreTrainedModel, config: TrialConfig, mesh: DeviceMesh) -> None:
    """Shard the parameters of `model` over `mesh` in place, in the units that accelerate makes.

    Units (accelerate 1.15, `fsdp2_prepare_model`): the input embedding; each decoder layer; final norm and output
    embedding together, never resharded after forward because backward wants them at once; the rest with the root. A
    tied embedding joins the last unit, since FSDP2 wants a shared parameter in one unit.

    Parameters stay fp32 shards and are cast for compute. Gradients are reduced in the compute dtype: accelerate sets
    `reduce_dtype` = `param_dtype`. It also casts every output to it; we do not, because the only output that this would
    change is the loss, which would keep three digits.
    """
    # Named norm, final_layernorm, ln_f: it is the last of the base model's own children that is one.
    norms = [module for module in model.base_model.children() if "Norm" in type(module).__name__]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shard_units(model, embedding, [*norms[-1:], head], config, mesh)


def shard_units(
    root: torch.nn.Module,
    embedding: torch.nn.Module | None,
    tail: list[torch.nn.Module],
    config: TrialConfig,
    mesh: DeviceMesh,
) -> None:
    """Shard the units of `shard_with_fsdp2`, of which a stage of a pipeline has some.

    With offload, parameters, gradients and optimizer states are the host's; a unit is copied up to be gathered.

    Args:
        root: what is called, with everything in it.
        embedding: the input embedding; None where another stage has it.
        tail: final norm and output embedding; empty where another stage has them.
        config: precision and stage.
        mesh: the ranks to shard over, its last dimension; over another before that, shards are replicated.
    """
    compute = COMPUTE_DTYPES[config.precision]
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute)
    reshard = config.zero_stage == 3
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=_offload_policy(config, mesh))
    for layer in checkpointed_layers(root):
        shard(layer, reshard_after_forward=reshard)
    if embedding is not None and tail and embedding.weight is tail[-1].weight:
        tail = [*tail[:-1], embedding, tail[-1]]
    elif embedding is not None:
        shard(embedding, reshard_after_forward=reshard)
    if tail:
        shard(tail, reshard_after_forward=False)
    shard(root, reshard_after_forward=False)


def _offload_policy(config: TrialConfig, mesh: DeviceMesh) -> OffloadPolicy:
    if config.offload == "none":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")


def materialize(
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    frozen: torch.dtype | None = None,
    on_host: bool = False,
    placed: Mapping[str, torch.device] | None = None,
) -> None:
    """Put `model` on `device` in `dtype` with the weights of `initial_weight`, in place.

    Sharded parameters keep their shards, which are `on_host` or on the device; buffers are on the device. The full
    value of one parameter at a time exists there besides.

    Args:
        model: its parameters are on meta.
        device: where it goes.
        dtype: of the parameters.
        seed: of the weights.
        frozen: the dtype of parameters that do not train; None for `dtype`.
        on_host: whether parameters go to the host instead.
        placed: where each of the modules that make up the model goes, by its name; None: all of it to `device`.
    """
    placed = {"": device} if placed is None else placed
    quantized = getattr(model, "is_loaded_in_4bit", False)
    if quantized:
        from autotune.modeling.quantized import is_packed, write_packed_weights

    def allocate(tensor: torch.Tensor, home: torch.device) -> torch.Tensor:
        # Only parameters are on meta; buffers carry values and keep their dtype.
        if tensor.is_meta and quantized and is_packed(tensor):
            return tensor
        if tensor.is_meta:
            kind = dtype if tensor.requires_grad or frozen is None else frozen
            return torch.empty_like(tensor, dtype=kind, device="cpu" if on_host else home)
        return tensor.to(home, copy=True)

    # `_apply` is what `Module.to_empty` is made of, and what FSDP2 overrides to follow its parameters.
    for name, home in placed.items():
        model.get_submodule(name)._apply(functools.partial(allocate, home=home))
    model.tie_weights()  # `_apply` gave each user of a shared parameter its own
    if quantized:
        write_packed_weights(model, placed, seed)
    write_initial_weights(model, device, seed)


def write_initial_weights(model: PreTrainedModel, device: torch.device, seed: int, *, frozen_too: bool = True) -> None:
    """Set each parameter, or each that trains, whole or sharded, to its `initial_weight`, in place."""
    std = initializer_range(model)
    for name, parameter in model.named_parameters():
        if not (frozen_too or parameter.requires_grad):
            continue
        if parameter.is_floating_point():  # what is in 4 bits has its value already
            fill(parameter, initial_weight(name, parameter.shape, device, std, seed))


@torch.no_grad()
def fill(parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
    """Set a parameter, or the shard that this rank has of it, to the whole value `full`, in place."""
    if isinstance(parameter, DTensor):
        # Every rank has made the same full value, so each cuts its own shard and no one sends anything.
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)


def initial_weight(name: str, shape: Iterable[int], device: torch.device, std: float, seed: int) -> torch.Tensor:
    """The random fp32 value of the parameter `name`, whole, on `device`.

    Depends on (seed, name, shape, kind of device) alone, never on the order of the parameters or on the sharding: the
    engines of one study train the same weights. Norms are ones, biases zeros, the rest normal(0, `std`). An adapter's B
    is zeros, so that training begins with the model as it is, its A normal(0, 1 / rank), as PEFT's `gaussian`. A matrix
    with an adapter has the value that it has without.
    """
    name = name.replace(".base_layer.", ".")
    if name.endswith(".bias") or ".lora_B." in name:
        return torch.zeros(*shape, device=device)
    if len(tuple(shape)) < 2:
        return torch.ones(*shape, device=device)
    if ".lora_A." in name:
        std = 1 / next(iter(shape))
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(*shape, device=device).normal_(0.0, std, generator=generator)


def initializer_range(model: PreTrainedModel) -> float:
    """Standard deviation of the initial weights; transformers' own default where the config names none."""
    return float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
