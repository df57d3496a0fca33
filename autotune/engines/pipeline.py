"""`PipelineEngine`: the layers in stages, through which the micro-batches of a step go one after another.

torch.distributed.pipelining runs the schedules. Memory and idle time follow from them, for p ranks and m micro-batches:

- `1f1b`: at most p - i micro-batches live on rank i, idle (p - 1) / m of the busy time (Narayanan et al.,
  arXiv:2104.04473, section 2.2.1).
- `interleaved_1f1b`: each rank has two stages, a half as many layers each; half the idle time, more messages and a few
  more live micro-batches (section 2.2.2).
- `zero_bubble`: interleaved, and the backward pass of the weights waits until a rank would idle (Qi et al.,
  arXiv:2401.10241). What it needs stays alive longer.

A micro-step is a whole optimizer step: the schedule mixes forward and backward passes, all within `forward`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from autotune.engines.layout import LayoutEngine
from autotune.modeling.build import COMPUTE_DTYPES
from autotune.modeling.stage import shifted_labels
from autotune.spec.request import TrialRequest

_MULTI_STAGE = {"interleaved_1f1b": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}
"""By `TrialConfig.pipeline_schedule`; those under which a rank has several stages."""


class PipelineEngine(LayoutEngine):
    """One rank of a trial with more than one pipeline stage."""

    def _lay_out(self, request: TrialRequest, device: torch.device) -> torch.nn.Module:
        config = request.config
        self._prepare_mesh(request, device)
        group = self._mesh.pipeline.get_group()
        ranks, rank = group.size(), self._mesh.pipeline.get_local_rank()
        schedule = _MULTI_STAGE.get(config.pipeline_schedule or "")
        stages = config.pipeline_stages
        mine = range(rank, stages, ranks)
        self._has_first, self._has_last = rank == 0, rank == ranks - 1
        modules = [self._stage(request, device, index, stages) for index in mine]
        shapes = _Shapes(request)
        pipelined = []
        for index, module in zip(mine, modules, strict=True):
            sent = shapes.loss() if index == stages - 1 else shapes.hidden()
            module.register_forward_hook(_announced(sent))
            received = shapes.tokens() if index == 0 else shapes.hidden()
            pipelined.append(
                PipelineStage(module, index, stages, device, input_args=received, output_args=sent, group=group)
            )
        batches = request.workload.gradient_accumulation_steps(config)
        # Gradients are those of the mean over the micro-batches already, see `_share`.
        if schedule is None:
            self._schedule: Any = Schedule1F1B(pipelined[0], batches, self._share, scale_grads=False)
        else:
            self._schedule = schedule([*pipelined], batches, loss_fn=self._share, scale_grads=False)
        return torch.nn.ModuleList(modules)

    def forward(self, input_ids: torch.Tensor, *, boundary: bool, **more: torch.Tensor) -> torch.Tensor:
        """See `Engine.forward`. The backward passes of all micro-batches are done on return.

        Args:
            input_ids: all micro-batches of the optimizer step, one after another.
            boundary: True; a pipeline is not left half full.
            more: nothing; sequences have one length.

        Returns:
            The mean loss, which every stage is told.
        """
        assert boundary
        return self._step(input_ids, self._schedule.step)

    def _forward_only(self, input_ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return self._step(input_ids, self._schedule.eval)

    def _step(self, input_ids: torch.Tensor, run: Callable[..., Any]) -> torch.Tensor:
        tokens, labels = self._piece(input_ids), self._piece(shifted_labels(input_ids))
        losses: list[torch.Tensor] = []
        with self._shared_logits():
            try:
                run(
                    *([tokens] if self._has_first else []),
                    **({"target": labels, "losses": losses} if self._has_last else {}),
                    labels=labels,
                )
            except RuntimeError as error:
                # Torch wraps what a stage raises; the kind of the first error is what a trial is judged by.
                raise error.__cause__ or error from None
        loss = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=input_ids.device)
        dist.all_reduce(loss, group=self._mesh.pipeline.get_group())
        return loss

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """See `Engine.backward`. Nothing is left to do."""

    def _share(self, loss: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
        """What a micro-batch's loss (1,) adds to that of the step."""
        return loss.sum() / self._accumulation


def _announced(expected: torch.Tensor) -> Callable[[torch.nn.Module, Any, torch.Tensor], None]:
    """A forward hook that holds a stage to what was announced of its output, which the next one receives.

    Messages are bytes: those of another dtype or shape arrive as other numbers, beside memory that nobody wrote, and
    neither torch nor gloo says so.
    """

    def hold(_stage: torch.nn.Module, _inputs: Any, sent: torch.Tensor) -> None:
        assert (sent.shape, sent.dtype) == (expected.shape, expected.dtype), (
            f"a stage sends {tuple(sent.shape)} of {sent.dtype}, and announced {tuple(expected.shape)}"
            f" of {expected.dtype}"
        )

    return hold


class _Shapes:
    """What stages send each other, as tensors on meta."""

    def __init__(self, request: TrialRequest) -> None:
        config = request.config
        self._batch = config.micro_batch_size
        self._tokens = config.sequence_length // config.sequence_parallel_size
        self._share = self._tokens // config.tensor_parallel_size
        self._width = request.model.hidden_size
        # FSDP2 casts the parameters, the embedding's too, and a frozen embedding has the compute dtype; under autocast
        # alone the residual stream stays fp32.
        is_cast = config.zero_stage > 0 or config.method != "full"
        self._dtype = COMPUTE_DTYPES[config.precision] if is_cast else torch.float32

    def tokens(self) -> torch.Tensor:
        """Into the first stage: (batch, tokens)."""
        return torch.empty(self._batch, self._tokens, dtype=torch.int64, device="meta")

    def hidden(self) -> torch.Tensor:
        """Between stages: (batch, tokens of a tensor-parallel rank, hidden_size)."""
        size = (self._batch, self._share, self._width)
        return torch.empty(size, dtype=self._dtype, device="meta", requires_grad=True)

    def loss(self) -> torch.Tensor:
        """Out of the last stage: (1,)."""
        return torch.empty(1, device="meta", requires_grad=True)
