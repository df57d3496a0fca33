"""LoRA's adapters (Hu et al., arXiv:2106.09685): which matrices have one, and how many parameters train.

Beside a frozen matrix W of `out` rows and `in` columns stand B (out x rank) and A (rank x in), which train; a module
gives W·x + alpha / rank · B·A·x.
"""

from autotune.spec.config import LoraTargets, TrialConfig
from autotune.spec.model import ModelSpec

ADAPTED_MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral")
"""Dense families whose matrices have the names below."""

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")


def adapted_matrices(model: ModelSpec, targets: LoraTargets) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each matrix of a layer that has an adapter, by the module's name."""
    hidden, inner = model.hidden_size, model.intermediate_size
    query, key_value = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    shapes = {
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    chosen = {"all-linear": ATTENTION_MODULES + MLP_MODULES, "attention": ATTENTION_MODULES, "mlp": MLP_MODULES}
    return {name: shapes[name] for name in chosen[targets]}


def flops_per_token(model: ModelSpec, config: TrialConfig) -> float:
    """FLOPs to train on one token, as `ModelSpec.flops_per_token` counts them.

    With frozen weights a backward pass has no gradients of them, so that N weights cost 4·N instead of 6·N; M
    parameters of adapters cost 6·M besides. Left out: writing weights out of 4 bits.
    """
    whole = model.flops_per_token(config.sequence_length)
    if config.method == "full":
        return whole
    return whole - model.flops_per_token(0) / 3 + 6.0 * trainable_parameters(model, config)


def trainable_parameters(model: ModelSpec, config: TrialConfig) -> int:
    """Parameters with a gradient and an optimizer state: all, or rank x (outputs + inputs) of each adapted matrix."""
    if config.lora_target_modules is None or config.lora_rank is None:
        return model.num_parameters
    sides = sum(map(sum, adapted_matrices(model, config.lora_target_modules).values()))
    return model.num_hidden_layers * config.lora_rank * sides
