"""`DeepSpeedEngine`: ZeRO 0-3 with offload, driven as accelerate drives it under the Hugging Face Trainer."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from autotune.engines.optimizers import build_optimizer
from autotune.engines.sequences import SharedSequences
from autotune.engines.swapping import require_aligned_gradients, require_locked_memory
from autotune.engines.tiled_mlp import apply_deepspeed_tiled_mlp
from autotune.formats.deepspeed_json import set_dotted, to_deepspeed
from autotune.modeling.build import (
    COMPUTE_DTYPES,
    apply_activation_checkpointing,
    apply_liger_kernel,
    apply_method,
    build_model,
    construct_model,
    initial_weight,
    initializer_range,
    loss_alone,
    materialize,
)
from autotune.spec.nvme import pinned_bytes
from autotune.spec.request import TrialRequest


class DeepSpeedEngine:
    """One rank of a trial on DeepSpeed.

    Raises:
        UsageError: the config asks DeepSpeed for what it cannot do, see `to_deepspeed`.
        RuntimeError: this process has told DeepSpeed of another kind of device.
    """

    def __init__(self, request: TrialRequest, device: torch.device) -> None:
        config, workload = request.config, request.workload
        document = to_deepspeed(config, workload, request.nvme_path)
        # DeepSpeed decides once per process, on its first import, by DS_ACCELERATOR or by what it finds.
        chosen = get_accelerator().device_name()
        if chosen != device.type:
            raise RuntimeError(f"DeepSpeed runs on {chosen} in this process, not on {device.type}; set DS_ACCELERATOR")
        if device.type == "cpu":
            _adapt_to_cpu(document)
        if config.swaps:
            require_locked_memory(pinned_bytes(config, request.model))
        # DeepSpeed takes its device from here, whatever the tensors say.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        deepspeed.init_distributed(auto_mpi_discovery=False)  # adopts the process group that exists

        if config.zero_stage == 3:
            model = _build_partitioned(request, document, device)
        else:
            model = build_model(request.model, config.attention)
            apply_method(model, config)
            # HF and DeepSpeed hold the weights in the compute dtype; fp32 masters are the optimizer's.
            materialize(model, device, COMPUTE_DTYPES[config.precision], workload.seed)
        apply_liger_kernel(model, config)
        apply_deepspeed_tiled_mlp(model, config)
        apply_activation_checkpointing(model, config)
        self._sequences = SharedSequences(model, config, device) if config.sequence_parallel_size > 1 else None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._engine: Any = deepspeed.initialize(
            model=model,
            # The Trainer makes an optimizer where the JSON names none. Else all that trains is in one group.
            optimizer=None if "optimizer" in document else build_optimizer(trained, config, workload),
            model_parameters=trained,
            config=document,
            mpu=None if self._sequences is None else self._sequences.groups,
            dist_init_required=False,
        )[0]
        self._config = config
        self._loss_alone = loss_alone(config)
        if config.swaps:
            require_aligned_gradients(self._engine.optimizer, Path(request.nvme_path or ""))
        # Plain fp32 is the one path on which DeepSpeed forgets the norm by which it clips.
        self._norm_is_ours = config.zero_stage == 0 and config.precision == "fp32"
        self._norm: float | torch.Tensor = float("nan")

    def forward(self, input_ids: torch.Tensor, *, boundary: bool, **more: torch.Tensor) -> torch.Tensor:
        """See `Engine.forward`."""
        self._engine.set_gradient_accumulation_boundary(boundary)
        if self._sequences is not None:  # of one length, with nothing among `more`
            return self._sequences.loss(self._engine, input_ids)
        loss: torch.Tensor = self._engine(**self._inputs(input_ids, more)).loss
        return loss

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """See `Engine.backward`. DeepSpeed divides by the accumulation steps itself."""
        self._engine.set_gradient_accumulation_boundary(boundary)
        self._engine.backward(loss)

    def update(self) -> None:
        """See `Engine.update`. DeepSpeed clips and clears the gradients itself."""
        if self._norm_is_ours:
            gradients = [parameter.grad for parameter in self._engine.module.parameters()]
            self._norm = torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None])
        self._engine.step()
        if not self._norm_is_ours:
            self._norm = self._engine.get_global_grad_norm()

    def gradient_norm(self) -> float:
        """See `Engine.gradient_norm`."""
        return float(self._norm)

    def _inputs(self, input_ids: torch.Tensor, more: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"input_ids": input_ids, "labels": input_ids, **more, **self._loss_alone, "use_cache": False}

    @torch.no_grad()
    def evaluate(self, input_ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """See `Engine.evaluate`. As under the Trainer, each rank has whole sequences even where they were shared."""
        self._engine.eval()
        loss: torch.Tensor = self._engine(**self._inputs(input_ids, more)).loss
        self._engine.train()
        return loss

    def save(self, folder: Path) -> None:
        """See `Engine.save`: DeepSpeed's checkpoint, as the Trainer asks for it."""
        self._engine.save_checkpoint(str(folder))

    def living_tensors(self) -> dict[str, list[torch.Tensor]]:
        """What lives between passes: `parameters`, `gradients`, `optimizer_states`, except what is on the `host`."""
        zero = self._engine.optimizer
        adam = getattr(zero, "optimizer", zero)  # ZeRO's own optimizer wraps it; stage 0 in fp32 has it bare
        model = list(self._engine.module.parameters())
        masters = [parameter for group in adam.param_groups for parameter in group["params"]]
        masters += _held(zero, "fp32_partitioned_groups_flat")  # stage 3 shows them to Adam one at a time
        partitions = [parameter.ds_tensor for parameter in model if hasattr(parameter, "ds_tensor")]
        # ZeRO++'s hpZ: made as the first forward pass of a step lets go of a parameter, given up after the update.
        partitions += [tensor for parameter in model for tensor in _held(parameter, "ds_secondary_tensor")]
        states = list(_tensors(adam.state))
        averaged = [*_held(zero, "averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")]
        gradients = [p.grad for p in (*masters, *model) if p.grad is not None]
        host: list[torch.Tensor] = []
        if self._config.offload != "none":
            host += [*masters, *states, *(p.grad for p in masters if p.grad is not None)]
            # Pinned copies of what goes up and comes down (stages 1 and 2), and gathered gradients (stage 3).
            host += _held(zero, "param_buffer_of_bit16_for_cpu_offload_groups", "temp_grad_buffer_for_cpu_offload")
            host += _held(zero, "accumulated_grads_in_cpu", "grad_partitions_flat_buffer", "averaged_gradients")
            host += _held(getattr(getattr(zero, "optimizer_swapper", None), "swap_buffer_manager", None), "all_buffers")
        if self._config.offloads_parameters:
            host += partitions
        if self._config.swaps_parameters:
            host += _held(getattr(model[0], "nvme_swapper", None), "buffers", "partitioned_swap_buffer")
        offloaded = {id(tensor) for tensor in host}
        device = {
            "parameters": [*model, *masters, *partitions],
            "gradients": [*averaged, *gradients],
            "optimizer_states": states,
        }
        return {part: [t for t in tensors if id(t) not in offloaded] for part, tensors in device.items()} | {
            "host": host
        }


def _held(owner: object, *names: str) -> Iterator[torch.Tensor]:
    """Tensors in those of the attributes that the owner has, however deep in lists and dictionaries."""
    for name in names:
        yield from _tensors(getattr(owner, name, None))


def _tensors(held: object) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)


def _build_partitioned(request: TrialRequest, document: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """Build under `deepspeed.zero.Init`: each module's parameters are partitioned as soon as it is constructed.

    transformers enters that context by itself while an `HfDeepSpeedConfig` of stage 3 is alive, with what it knows to
    be needed around it (no weight initialisation, rotary buffers kept fp32). Weights are then written one parameter at
    a time, gathered, so they equal those of an unpartitioned model.
    """
    alive = HfDeepSpeedConfig(document)
    model = construct_model(request.model, request.config.attention)
    apply_method(model, request.config)  # its parameters are whole until `deepspeed.initialize` partitions them too
    del alive
    write_partitioned_weights(model, device, request.workload.seed)
    return model


@torch.no_grad()
def write_partitioned_weights(model: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Set each parameter, partitioned or still whole, to its `initial_weight`, in place."""
    std = initializer_range(model)
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_shape"):
            parameter.copy_(initial_weight(name, parameter.shape, device, std, seed))
            continue
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.copy_(initial_weight(name, parameter.ds_shape, device, std, seed))


def _adapt_to_cpu(document: dict[str, Any]) -> None:
    """Let DeepSpeed run where it would compile C++ first, in place; nothing of this is exported.

    Its fused Adams and its shared-memory collectives are compiled on first use, for more than a minute each; torch's
    fused AdamW, which works in place like them, and gloo do the same work. Nor is there a device that pinned memory
    could be copied to.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "optimizer" in document:
        set_dotted(document, "optimizer.params.torch_adam", True)
        set_dotted(document, "optimizer.params.fused", True)
    document["zero_force_ds_cpu_optimizer"] = False
    document["zero_allow_untested_optimizer"] = True
    for section in ("offload_optimizer", "offload_param"):
        if section in document["zero_optimization"]:
            document["zero_optimization"][section]["pin_memory"] = False
