"""An engine that writes down what is asked of it."""

import itertools
from pathlib import Path

import torch


class Recorder:
    def __init__(self, losses: list[float] | None = None) -> None:
        self.calls: list[str] = []
        self._losses = iter(losses or itertools.repeat(1.0))

    def forward(self, input_ids: torch.Tensor, *, boundary: bool, **more: torch.Tensor) -> torch.Tensor:
        self.calls.append(f"forward {input_ids.item()} {boundary}")
        return torch.tensor(next(self._losses))

    def backward(self, loss: torch.Tensor, *, boundary: bool) -> None:
        self.calls.append(f"backward {boundary}")

    def update(self) -> None:
        self.calls.append("update")

    def gradient_norm(self) -> float:
        return 1.0

    def evaluate(self, input_ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return torch.tensor(1.0)

    def save(self, folder: Path) -> None:
        self.calls.append(f"save {folder}")
