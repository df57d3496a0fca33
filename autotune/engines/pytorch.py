"""`PyTorchEngine`: DDP and FSDP2, doing what the Hugging Face Trainer does for the same settings.

The exported winner runs under transformers' Trainer, so the trial must use its memory and its communication. What it
and accelerate do (read in transformers 5.23 and accelerate 1.15), and what follows here:

- bf16 and fp16 are autocast around the model's forward, its outputs then cast to fp32 (`Accelerator.prepare_model`),
  under FSDP2 in addition to the mixed-precision policy (`autotune.modeling.build.shard_with_fsdp2`).
- Micro-steps that only accumulate do not synchronise (`Accelerator.no_sync`): DDP's `no_sync`, FSDP2's
  `set_requires_gradient_sync(False)`. Under FSDP2 a rank so holds the gradients of the *whole* model, in the compute
  dtype, between the micro-steps. That is what the Trainer needs too, unless its `sync_each_batch` is set.
- DDP searches for unused parameters unless activations are checkpointed (`Trainer._build_accelerator_args`).
- One process is no DDP.
- AdamW is torch's fused one, bitsandbytes' or torchao's, with weight decay on matrices only. Clipping is
  `clip_grad_norm_`, whose norm is global: DTensor gradients reduce over the mesh.
- Adapters of LoRA are fp32 like all that trains; frozen weights have the compute dtype, in which they are loaded.
- fp16 has a dynamic loss scale (`torch.amp.GradScaler`, which accelerate uses with FSDP2 as well). accelerate refuses
  fp16 on CPU; torch can do it, so the code path is tested there.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationMixin

from autotune.engines.optimizers import build_optimizer
from autotune.errors import UsageError
from autotune.modeling.build import (
    COMPUTE_DTYPES,
    apply_activation_checkpointing,
    apply_compilation,
    apply_fp8,
    apply_liger_kernel,
    apply_method,
    build_model,
    loss_alone,
    materialize,
    shard_with_fsdp2,
)
from autotune.modeling.mesh import data_parallel_mesh
from autotune.modeling.tiled_mlp import apply_tiled_mlp
from autotune.spec.request import TrialRequest


class PyTorchEngine:
    """One rank of a trial on DDP (stage 0) or FSDP2 (stage 2: kept gathered after forward; 3: resharded).

    Raises:
        UsageError: the config asks for what this engine does not have: stage 1, offload of something else than all that
            FSDP2 shards.
    """

    def __init__(self, request: TrialRequest, device: torch.device) -> None:
        config, workload = request.config, request.workload
        offloads = ("none", "optimizer+parameters") if config.zero_stage else ("none",)
        if config.zero_stage not in (0, 2, 3) or config.offload not in offloads:
            raise UsageError(
                f"engine pytorch has zero_stage 0, and 2 and 3 with offload none or optimizer+parameters,"
                f" not zero_stage {config.zero_stage} with offload {config.offload}"
            )
        self._accumulation = workload.gradient_accumulation_steps(config)
        # 0 means no clipping, to the Trainer and to DeepSpeed; to `clip_grad_norm_` it would mean no gradients.
        self._max_norm = workload.max_gradient_norm or float("inf")
        self._model = self._lay_out(request, device)
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self._parameters, config, workload)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._norm = torch.tensor(float("nan"))
        self._offload = config.offload
        self._loss_alone = loss_alone(config)

    def _lay_out(self, request: TrialRequest, device: torch.device) -> torch.nn.Module:
        """The module that `forward` calls, on the device and wrapped as the config says."""
        config = request.config
        model = build_model(request.model, config.attention)
        apply_method(model, config)
        apply_tiled_mlp(model, config)
        apply_liger_kernel(model, config)
        apply_fp8(model, config, device)
        apply_activation_checkpointing(model, config)
        apply_compilation(model, config)
        if config.precision != "fp32":
            autocast = torch.autocast(device.type, COMPUTE_DTYPES[config.precision])
            model.forward = convert_outputs_to_fp32(autocast(model.forward))
        if config.zero_stage:
            shard_with_fsdp2(model, config, data_parallel_mesh(device.type, config))
        frozen = COMPUTE_DTYPES[config.precision]
        on_host = config.offload != "none"
        materialize(model, device, torch.float32, request.workload.seed, frozen=frozen, on_host=on_host)
        sharded: torch.nn.Module = model
        if config.zero_stage or config.gpus == 1:
            return sharded
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=config.activation_checkpointing == "none",
        )

    def forward(self, input_ids: torch.Tensor, *, boundary: bool, **more: torch.Tensor) -> torch.Tensor:
        """See `Engine.forward`."""
        with self._synchronised(boundary):
            # The model shifts the labels itself. No mask: that of full sequences of one length is all ones, for which
            # transformers makes none.
            inputs = {"input_ids": input_ids, "labels": input_ids, **more}
            loss: torch.Tensor = self._model(**inputs, **self._loss_alone, use_cache=False).loss
        return loss

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """See `Engine.backward`."""
        with self._synchronised(boundary):
            self._scaler.scale(loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """See `Engine.update`. With fp16, a step whose gradients overflow changes only the loss scale."""
        self._scaler.unscale_(self.optimizer)
        self._norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        """See `Engine.gradient_norm`."""
        norm = self._norm.full_tensor() if isinstance(self._norm, DTensor) else self._norm
        return norm.item()

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters of this rank, whole or sharded, by Hugging Face's names."""
        for module in self._model.modules():
            if isinstance(module, GenerationMixin):  # the causal model, or the one of each stage
                yield from module.named_parameters()

    def stage(self) -> tuple[int, bool]:
        """A number that ranks with the same parameters have in common, and whether this is the first of them."""
        return 0, dist.get_rank() == 0

    @torch.no_grad()
    def evaluate(self, input_ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """See `Engine.evaluate`."""
        self._model.eval()
        loss = self._forward_only(input_ids, **more)
        self._model.train()
        return loss

    def _forward_only(self, input_ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return self.forward(input_ids, boundary=True, **more)

    def save(self, folder: Path) -> None:
        """See `Engine.save`. Each rank its shards, as accelerate saves FSDP2 by default; under DDP rank 0 all.

        A model with adapters saves them alone, as transformers does.
        """
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self._model, self.optimizer, options=options)
        save({f"stage {self.stage()[0]}": {"model": model, "optimizer": optimizer}}, checkpoint_id=folder)

    def living_tensors(self) -> dict[str, list[torch.Tensor]]:
        """What lives between passes: `parameters`, `gradients`, `optimizer_states`; gathered ones are `buffers`, and
        what is offloaded is on the `host`.
        """
        values = (value for state in self.optimizer.state.values() for value in state.values())
        states = [value for value in values if isinstance(value, torch.Tensor)]
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        gathered = list(self._gathered())
        whole = {
            "buffers": [parameter for parameter, _ in gathered],
            "gradients": [gradient for _, gradient in gathered if gradient is not None],
        }
        if self._offload != "none":
            return whole | {"host": [*self._model.parameters(), *gradients, *states]}
        return whole | {
            "parameters": list(self._model.parameters()),
            "gradients": [*gradients, *whole["gradients"]],
            "optimizer_states": states,
        }

    def _gathered(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """FSDP2's whole parameters, of which only the storage comes and goes, with their whole gradients."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
                for held in group.fsdp_params:
                    whole = getattr(held, "_unsharded_param", None)
                    if whole is not None:
                        yield whole, whole.grad if whole.grad is not None else held.unsharded_accumulated_grad

    def _synchronised(self, boundary: bool) -> AbstractContextManager[None]:
        """Gradients are reduced over the ranks in the backward pass exactly if `boundary`."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(boundary)
        elif isinstance(self._model, DistributedDataParallel) and not boundary:
            return self._model.no_sync()
        return nullcontext()


def build_pytorch_engine(request: TrialRequest, device: torch.device) -> PyTorchEngine:
    """The engine of the config's layout, see `autotune.engines.engine.build_engine`."""
    if request.config.device_map == "auto":
        from autotune.engines.device_map import SpreadEngine

        return SpreadEngine(request, device)
    if request.config.pipeline_parallel_size > 1:
        from autotune.engines.pipeline import PipelineEngine

        return PipelineEngine(request, device)
    if request.config.has_own_layout:
        from autotune.engines.layout import LayoutEngine

        return LayoutEngine(request, device)
    return PyTorchEngine(request, device)
