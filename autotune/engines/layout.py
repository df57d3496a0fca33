"""`LayoutEngine`: tensor and sequence parallel ranks, under DDP or FSDP2 over what is left, and a loss in chunks.

Precision, clipping, optimizer and accumulation are those of `PyTorchEngine`. Parameters that no rank but the
data-parallel ones share are plain tensors or FSDP2's; the others are DTensors, and the norm of their gradients is the
one thing that needs care: each shard counts once, however many ranks have a copy of it.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

from autotune.engines.pytorch import PyTorchEngine
from autotune.modeling.build import (
    COMPUTE_DTYPES,
    apply_activation_checkpointing,
    apply_method,
    build_model,
    materialize,
    shard_units,
)
from autotune.modeling.mesh import ParallelMesh, parallel_mesh
from autotune.modeling.stage import DecoderStage, shifted_labels
from autotune.modeling.tensor_parallel import split_matrices
from autotune.modeling.tiled_mlp import apply_tiled_mlp
from autotune.modeling.ulysses import split_sequence
from autotune.spec.request import TrialRequest


class LayoutEngine(PyTorchEngine):
    """One rank of a trial whose model is split.

    Raises:
        UsageError: see `PyTorchEngine`.
    """

    _mesh: ParallelMesh

    def _lay_out(self, request: TrialRequest, device: torch.device) -> torch.nn.Module:
        self._prepare_mesh(request, device)
        return self._stage(request, device, 0, 1)

    def _prepare_mesh(self, request: TrialRequest, device: torch.device) -> None:
        self._mesh = parallel_mesh(device.type, request.config)
        self._stage_ranks = request.config.gpus // request.config.pipeline_parallel_size

    def _stage(self, request: TrialRequest, device: torch.device, index: int, stages: int) -> torch.nn.Module:
        """A stage on the device, each kind of parallelism around the one before."""
        config, mesh = request.config, self._mesh
        model = build_model(request.model, config.attention)
        apply_method(model, config)
        apply_tiled_mlp(model, config)
        apply_activation_checkpointing(model, config)
        if config.sequence_parallel_size > 1:
            split_sequence(model, config.attention, mesh.sequence.get_group())
        stage = DecoderStage(
            model,
            config,
            stage=index,
            stages=stages,
            sequence_rank=mesh.sequence.get_local_rank(),
            autocast=None if config.precision == "fp32" else COMPUTE_DTYPES[config.precision],
        )
        if config.tensor_parallel_size > 1:
            split_matrices(stage, mesh.tensor)
            model.tie_weights()  # each user of a shared parameter has a DTensor of its own now
        if config.zero_stage:
            tail = [module for module in (stage.norm, stage.head) if module is not None]
            shard_units(stage, stage.embedding, tail, config, mesh.sharding)
        frozen = COMPUTE_DTYPES[config.precision]
        on_host = config.offload != "none"
        materialize(model, device, torch.float32, request.workload.seed, frozen=frozen, on_host=on_host)
        if config.zero_stage or config.replicas == 1:
            return stage
        return DistributedDataParallel(
            stage,
            device_ids=[device.index] if device.type == "cuda" else None,
            process_group=mesh.replicas.get_group(),
        )

    def forward(self, input_ids: torch.Tensor, *, boundary: bool, **more: torch.Tensor) -> torch.Tensor:
        """See `Engine.forward`. With sequence parallelism the loss is of this rank's piece, and their mean is meant.

        There is nothing more: sequences have one length.
        """
        with self._synchronised(boundary), self._shared_logits():
            loss: torch.Tensor = self._model(self._piece(input_ids), self._piece(shifted_labels(input_ids)))
        return loss.squeeze(0)

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """See `Engine.backward`."""
        with self._shared_logits():
            super().backward(loss, boundary=boundary)

    def update(self) -> None:
        """See `Engine.update`."""
        self._scaler.unscale_(self.optimizer)
        gradients = _local_gradients(self._parameters)
        self._norm = self._global_norm(gradients)
        torch._foreach_mul_(
            [gradient for gradient, _ in gradients], (self._max_norm / (self._norm + 1e-6)).clamp(max=1)
        )
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()

    def stage(self) -> tuple[int, bool]:
        """See `PyTorchEngine.stage`."""
        mesh = self._mesh
        first = mesh.replicas.get_local_rank() == 0 and mesh.tensor.get_local_rank() == 0
        return mesh.pipeline.get_local_rank(), first

    def _global_norm(self, gradients: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
        """The norm () over all ranks: of each shard as many ranks of the stage have a copy as there are more ranks than
        shards, so that the squares times shards / ranks add up to one of each.
        """
        squares = torch.zeros((), device=gradients[0][0].device)
        for shards in sorted({shards for _, shards in gradients}):
            norm = torch.nn.utils.get_total_norm([gradient for gradient, count in gradients if count == shards])
            squares += norm**2 * shards / self._stage_ranks
        dist.all_reduce(squares)
        return squares.sqrt()

    def _piece(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's piece (batch, sequence / ranks) of every sequence (batch, sequence)."""
        mesh = self._mesh.sequence
        return tokens.chunk(mesh.size(), dim=1)[mesh.get_local_rank()].contiguous()

    def _shared_logits(self) -> AbstractContextManager[None]:
        """Cross entropy over a vocabulary that the tensor-parallel ranks share, its backward pass included."""
        return loss_parallel() if self._mesh.tensor.size() > 1 else nullcontext()


def _local_gradients(parameters: list[torch.nn.Parameter]) -> list[tuple[torch.Tensor, int]]:
    """What this rank has of each gradient, and how many shards make the whole."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            found.append((gradient, 1))
            continue
        if gradient.placements != parameter.placements:  # each rank has a summand of it
            gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
        sizes = [
            gradient.device_mesh.size(at) for at, place in enumerate(gradient.placements) if not place.is_replicate()
        ]
        found.append((gradient.to_local(), math.prod(sizes)))
    return found
