"""Tensor parallelism by DTensor: every weight matrix is shared, and between the matrices the sequence.

Megatron's division (Shoeybi et al., arXiv:1909.08053): the matrices into a block are cut by outputs, those out of it by
inputs, heads stay whole. Norms and the residual stream hold a share of the sequence (Korthikanti et al.,
arXiv:2205.05198), so a block begins with an all-gather and ends with a reduce-scatter. The vocabulary is shared by the
embedding and by the head, whose loss never gathers the logits (`autotune.modeling.stage`).

The plan is our own: transformers' keeps the whole sequence on every rank.
"""

import warnings

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from autotune.modeling.build import checkpointed_layers
from autotune.modeling.stage import DecoderStage

_SEQUENCE = 1
"""Dimension of the residual stream (batch, sequence, hidden)."""
_HEADS = 2
"""Dimension of queries and keys (batch, sequence, heads, width) when they are normed."""


def layer_plan(layer: torch.nn.Module) -> dict[str, ParallelStyle]:
    """How the modules of a decoder layer are shared, by their names.

    The norms of queries and keys hold one head's weight, which ranks see with their own heads only: as parameters that
    belong to all ranks their gradients are summed. Left out of the plan, they would silently drift apart.
    """
    plan: dict[str, ParallelStyle] = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(_SEQUENCE)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.q_norm": SequenceParallel(sequence_dim=_HEADS, use_local_output=True),
        "self_attn.k_norm": SequenceParallel(sequence_dim=_HEADS, use_local_output=True),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(_SEQUENCE)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(_SEQUENCE),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(_SEQUENCE)),
    }
    present = {name for name, _ in layer.named_modules()}
    if "mlp.tile" in present:  # each piece is gathered by itself
        plan |= {"mlp.tile": plan.pop("mlp"), "mlp.down_proj": _Waited(output_layouts=Shard(_SEQUENCE))}
    for name in [name for name in plan if f"{name}.lora_A" in present]:
        plan |= _adapted(name, plan.pop(name))
    return {name: style for name, style in plan.items() if name in present}


def _adapted(name: str, style: ParallelStyle) -> dict[str, ParallelStyle]:
    """A matrix and its adapter: A is cut as the matrix is and its few outputs made whole; B is cut by its outputs,
    which leave it as the matrix's do.
    """
    first: ParallelStyle
    if isinstance(style, ColwiseParallel):
        first, second = ColwiseParallel(output_layouts=Replicate()), ColwiseParallel()
    else:
        style = _Waited(output_layouts=Shard(_SEQUENCE))
        first = RowwiseParallel(output_layouts=Replicate())
        second = ColwiseParallel(output_layouts=Shard(_SEQUENCE))
    return {f"{name}.base_layer": style, f"{name}.lora_A.default": first, f"{name}.lora_B.default": second}


class _Waited(RowwiseParallel):
    """Waits for its result at once, not when it is first read.

    A layer that is recomputed for its backward pass stops before the adapter's product is added to the last matrix's,
    or before the pieces of a tiled MLP are joined, and of a result that nobody reads torch keeps the memory for ever.
    """

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(_wait)
        return module


def _wait(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
    if isinstance(output, AsyncCollectiveTensor):
        output.trigger_wait()  # type: ignore[no-untyped-call]  # torch annotates neither it nor its result


def split_matrices(stage: DecoderStage, mesh: DeviceMesh) -> None:
    """Share the parameters of `stage` over `mesh`, in place. They are on meta, and become DTensors there."""
    # FSDP2 warns of what modules return that is a view, as a DTensor's local part is: nothing here writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    frozen = {name for name, parameter in stage.named_parameters() if not parameter.requires_grad}
    for layer in checkpointed_layers(stage):
        parallelize_module(layer, mesh, layer_plan(layer))
    if stage.embedding is not None:
        parallelize_module(
            stage.embedding, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(_SEQUENCE))
        )
    if stage.head is not None and stage.norm is not None:
        parallelize_module(stage.norm, mesh, SequenceParallel())
        weight = distribute_tensor(stage.head.weight, mesh, [Shard(0)])
        stage.head.weight = torch.nn.Parameter(weight)
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(name not in frozen)  # the styles make new parameters, some of which would train
