"""`TrainerCallback`: a trial's eyes in transformers' Trainer, and in what is built on it (TRL, Axolotl, LLaMA-Factory).

The Trainer tells a callback when micro-steps and optimizer steps end. Tokens, loss, rows and phases are read off the
model's own forward passes.
"""

from typing import Any

import torch
from transformers import TrainerCallback as _TrainerCallback
from transformers import TrainerControl, TrainerState, TrainingArguments

from autotune.script.session import Session, current
from autotune.spec.outcome import Phase


class TrainerCallback(_TrainerCallback):  # type: ignore[misc] # transformers is not type-checked
    """Measures what the Trainer does, and ends the process when it is enough. Outside a trial it does nothing.

    A step's time is that of its forward and backward passes and its update: data loading, logging and saving are left
    out. A candidate that the script does not follow is refused: another micro-batch, or another number of them.
    """

    def __init__(self) -> None:
        self._session = current()
        self._tokens: torch.Tensor | int | None = None
        self._loss: torch.Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called when the model is wrapped and has its optimizer."""
        session, model = self._session, kwargs["model"]
        if session is None:
            return
        model.register_forward_pre_hook(self._forward_begins, with_kwargs=True)
        model.register_forward_hook(self._forward_ends)
        session.begin_training()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called when the batches of an optimizer step are loaded."""
        if self._session is not None:
            self._session.start_clock()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after a micro-step that only accumulates."""
        self._report(boundary=False)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after clipping."""
        if self._session is not None:
            self._session.enter_phase(Phase.OPTIMIZER)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after the optimizer's update."""
        self._report(boundary=True)

    def _report(self, *, boundary: bool) -> None:
        if self._session is None:
            return
        loss, tokens, self._loss, self._tokens = self._loss, self._tokens, None, None
        self._session.report(boundary=boundary, loss=loss, tokens=tokens)

    def _forward_begins(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session = self._session
        if session is None or not model.training:  # an evaluation
            return
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(inputs, torch.Tensor):
            _check_rows(session, inputs)
            mask = kwargs.get("attention_mask")
            # Summed where it is, and read after the clock has stopped.
            masked = isinstance(mask, torch.Tensor) and mask.shape == inputs.shape
            self._tokens = kwargs["attention_mask"].sum() if masked else inputs.numel()
        session.enter_phase(Phase.FORWARD)

    def _forward_ends(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._session is None or not model.training:
            return
        loss = getattr(output, "loss", None)
        self._loss = loss.detach() if isinstance(loss, torch.Tensor) else None
        self._session.enter_phase(Phase.BACKWARD)


def _check_rows(session: Session, inputs: torch.Tensor) -> None:
    config = session.request.config
    packed = config.batching == "packed"
    if inputs.shape[0] != (1 if packed else config.micro_batch_size):
        meant = "batching is packed" if packed else f"micro_batch_size is {config.micro_batch_size}"
        session.refuse(
            f"the script's forward pass has {inputs.shape[0]} rows, but the trial's {meant};"
            f" pass it {'{batching}' if packed else '{micro_batch_size} or {training_args}'}"
        )
