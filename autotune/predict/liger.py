"""What stands for Liger's kernels where a step is traced: they run on GPUs alone, and a plan is made anywhere.

Each function allocates and saves what Liger's of the same name does on a GPU, and computes nothing. Read in
liger-kernel 0.8.5, ops/: rms_norm.py, rope.py, swiglu.py, fused_linear_cross_entropy.py. Held against that source by
`tests/predict/test_liger.py`; not measured on a GPU.
"""

import importlib
from types import MethodType, ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from autotune.modeling.build import checkpointed_layers


class _RMSNorm(torch.autograd.Function):
    """Saves the input, whatever its dtype, and an fp32 value a row."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = hidden.contiguous().view(-1, hidden.shape[-1])
        normed = torch.empty_like(rows)
        ctx.save_for_backward(rows, weight, torch.empty(len(rows), dtype=torch.float32, device=hidden.device))
        return normed.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Written over the gradient of the output. Each multiprocessor's share of that of the weight is left out.
        weight = ctx.saved_tensors[1]
        return gradients[0].contiguous(), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _Rope(torch.autograd.Function):
    """Turns queries and keys, (batch, heads, tokens, width), where they lie, if they lie by tokens."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return _by_tokens(q), _by_tokens(k)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _by_tokens(gradients[0]), _by_tokens(gradients[1]), None, None


class _SiLUMul(torch.autograd.Function):
    """Saves both factors, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradients[0].contiguous()
        gate, up = ctx.saved_tensors
        return gate.view_as(gate), up.view_as(up)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """The loss from hidden values (tokens, h) and the head's weight (V, h), whose gradients it has when it returns.

    Of the logits it has a power of two of rows at a time, such that they have h to 2·h values a token (`inc_factor`).
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        of_hidden = torch.zeros_like(hidden)
        of_weight = torch.zeros_like(weight) if weight.requires_grad else None
        of_tokens = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        _ = labels != -100
        computed = _computed(weight)
        # Under autocast fp32 weights are cast for each piece; one piece at a time is alive.
        cast = weight if computed == weight.dtype else torch.empty_like(weight, dtype=computed)
        logits = hidden.new_empty(len(hidden), min(2 * hidden.shape[1], len(weight)), dtype=computed)
        del cast, logits
        ctx.save_for_backward(of_hidden.detach(), None if of_weight is None else of_weight.detach())
        return of_tokens.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden, of_weight, None


def _by_tokens(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


def _computed(weight: torch.Tensor) -> torch.dtype:
    """The dtype of a product with `weight`."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any) -> Any:
    """Stands for `liger_rotary_pos_emb`, which replaces transformers' `apply_rotary_pos_emb`."""
    return _Rope.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]  # torch has not annotated it


def rotary_module(model_type: str) -> ModuleType:
    """Whose `apply_rotary_pos_emb` Liger replaces for a family."""
    return importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def stand_in(model: PreTrainedModel, _config: object) -> None:
    """Do to the modules of `model` what transformers' `apply_liger_kernel` has Liger do, in place."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_normed, module)
    for layer in checkpointed_layers(model):
        layer.mlp.forward = MethodType(_mlp, layer.mlp)
    model.forward = MethodType(_loss, model)


def _normed(norm: Any, hidden: torch.Tensor) -> Any:
    return _RMSNorm.apply(hidden, norm.weight)  # type: ignore[no-untyped-call]  # torch has not annotated it


def _mlp(mlp: Any, hidden: torch.Tensor) -> Any:
    product = _SiLUMul.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden))  # type: ignore[no-untyped-call]  # torch has not annotated it
    return mlp.down_proj(product)


def _loss(model: Any, *, labels: torch.Tensor, skip_logits: bool, **inputs: Any) -> Any:
    hidden = model.model(**inputs)[0]
    labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    rows, weight = hidden.view(-1, hidden.shape[-1]), model.lm_head.weight
    loss = _FusedLinearCrossEntropy.apply(rows, weight, labels.view(-1))  # type: ignore[no-untyped-call]  # torch has not annotated it
    return CausalLMOutputWithPast(loss=loss)
