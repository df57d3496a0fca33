"""The seam between a trial and the library that runs its step."""

from pathlib import Path
from typing import Protocol

import torch

from autotune.spec.request import TrialRequest


class Engine(Protocol):
    """One rank's share of a training step.

    A micro-step is `forward` then `backward`; the last micro-step of an optimizer step has `boundary=True` and is
    followed by `update`. Callers may cut an accumulation short: what counts is the flag, not the configured number of
    steps. Losses are scaled by 1/gradient_accumulation_steps inside, so that the gradients of a full accumulation are
    those of the mean over the global batch.

    Every rank calls the same methods in the same order. Nothing is caught inside: an allocation that fails, a library
    that refuses, reach the caller as they are.
    """

    def forward(self, input_ids: torch.Tensor, *, boundary: bool, **more: torch.Tensor) -> torch.Tensor:
        """The unscaled mean loss (scalar) of `input_ids` (micro-batch, sequence), labels being the inputs unless they
        are among `more`, the model's further inputs (`autotune.engines.batches.MicroBatch`).
        """
        ...

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        """Accumulate gradients."""
        ...

    def update(self) -> None:
        """Clip, update the weights, clear the gradients."""
        ...

    def gradient_norm(self) -> float:
        """Global gradient norm of the last `update`, before clipping."""
        ...

    def evaluate(self, input_ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """The mean loss (scalar) of inputs like those of `forward`, without gradients, dropout or checkpointing."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer states as the job that is exported would, each rank its share.

        Args:
            folder: is there already on this node.
        """
        ...


def build_engine(request: TrialRequest, device: torch.device) -> Engine:
    """Build the model on `device`, sharded as the config says, with its optimizer.

    The default process group exists already (`nccl` on CUDA, `gloo` on CPU); its world size is `config.gpus`.
    """
    if request.config.engine == "deepspeed":
        from autotune.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(request, device)
    from autotune.engines.pytorch import build_pytorch_engine

    return build_pytorch_engine(request, device)
