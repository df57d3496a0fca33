"""The synthetic global batch: the same sequences for every split over ranks and micro-batches.

Sequence i of optimizer step s depends on (seed, s, i) alone. Two configs of one study so train on equal data, and a
layout can be held against a single process: losses and gradient norms must agree (`tests/engines/test_parity.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch

from autotune.spec.config import Batching, TrialConfig
from autotune.spec.workload import Workload


def sequence(
    seed: int, step: int, index: int, length: int, vocab_size: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Token ids (length,) of sequence `index` of optimizer step `step`, uniform over the vocabulary.

    Made on the host with numpy, whose stream for a seed is fixed (NEP 19's `Generator` with a named bit generator), so
    CPU and CUDA trials see the same tokens.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, step, index))))
    return generator.integers(0, vocab_size, size=length, dtype=np.int64)


def sequence_indexes(config: TrialConfig, workload: Workload, *, micro_step: int, rank: int) -> list[int]:
    """Which sequences of the global batch one rank's forward pass has, in order.

    The micro-batches of an optimizer step walk through the global batch; within one, the data-parallel ranks stand side
    by side: data-parallel rank r of R takes sequences (index of the micro-batch x R + r) x micro_batch_size onwards. A
    micro-step has one micro-batch, that of a pipeline all of the optimizer step one after another.

    Raises:
        ValueError: `micro_step` lies outside the optimizer step.
    """
    steps = workload.micro_steps(config)
    if not 0 <= micro_step < steps:
        raise ValueError(f"micro_step {micro_step} is outside an optimizer step of {steps} micro-steps")
    size, ranks = config.micro_batch_size, config.data_parallel_size
    batches = workload.gradient_accumulation_steps(config) // steps
    firsts = [
        (batch * ranks + config.data_parallel_rank(rank)) * size
        for batch in range(micro_step * batches, (micro_step + 1) * batches)
    ]
    return [first + i for first in firsts for i in range(size)]


def micro_batch(
    config: TrialConfig, workload: Workload, vocab_size: int, *, step: int, micro_step: int, rank: int
) -> torch.Tensor:
    """Token ids (sequences, sequence_length) int64, on the host, of `sequence_indexes`.

    Raises:
        ValueError: `micro_step` lies outside the optimizer step.
    """
    indexes = sequence_indexes(config, workload, micro_step=micro_step, rank=rank)
    return torch.from_numpy(
        np.stack([sequence(workload.seed, step, index, config.sequence_length, vocab_size) for index in indexes])
    )


PADDING_LABEL = -100
"""Of a position that has no loss; torch's `cross_entropy` leaves it out."""

LENGTH_STREAM = 0x6C656E
"""Keeps the draws of lengths apart from those of tokens."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass is given."""

    input_ids: torch.Tensor
    """(rows, tokens of a row) int64."""
    tokens: int
    """Padding left out."""
    more: dict[str, torch.Tensor] = field(default_factory=dict)
    """The model's further inputs, by its own names; empty where all sequences have one length."""

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        more = {name: tensor.to(device) for name, tensor in self.more.items()}
        return type(self)(self.input_ids.to(device), self.tokens, more)


def collated(sequences: Sequence[torch.Tensor], batching: Batching, sequence_length: int) -> MicroBatch:
    """Sequences of different lengths as the collators of the Hugging Face stack make a micro-batch of them.

    Padding is on the right, has the label -100 and a mask, as `DataCollatorForSeq2Seq` makes it. Packed sequences lie
    in one row; positions start anew with each, by which transformers keeps attention within it, and its first token is
    no label of the one before, as `DataCollatorWithFlattening` makes it.

    Args:
        sequences: token ids (tokens,) of each.
        batching: not `fixed`.
        sequence_length: what `padded` pads to.
    """
    lengths = [len(found) for found in sequences]
    if batching == "packed":
        row = torch.cat(list(sequences))
        labels = row.clone()
        labels[[sum(lengths[:i]) for i in range(len(lengths))]] = PADDING_LABEL
        positions = torch.cat([torch.arange(length) for length in lengths])
        more = {"labels": labels[None], "position_ids": positions[None]}
        return MicroBatch(row[None], sum(lengths), more)
    width = sequence_length if batching == "padded" else max(lengths)
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    ids = torch.stack([torch.nn.functional.pad(found, (0, width - len(found))) for found in sequences])
    more = {"labels": ids.masked_fill(mask == 0, PADDING_LABEL), "attention_mask": mask}
    return MicroBatch(ids, sum(lengths), more)


def inputs(
    config: TrialConfig,
    workload: Workload,
    vocab_size: int,
    *,
    step: int,
    micro_step: int,
    rank: int,
    longest: bool = False,
) -> MicroBatch:
    """One rank's micro-batch, on the host, as the config batches it.

    Args:
        config: the trial's.
        workload: with the lengths of sequences.
        vocab_size: of the model.
        step: optimizer step.
        micro_step: within it.
        rank: of the gang.
        longest: every sequence is as long as the longest, but for one token where batches may have padding: with none
            transformers makes no mask, which needs memory too.

    Raises:
        ValueError: `micro_step` lies outside the optimizer step.
    """
    if config.batching == "fixed":
        ids = micro_batch(config, workload, vocab_size, step=step, micro_step=micro_step, rank=rank)
        return MicroBatch(ids, ids.numel())
    indexes = sequence_indexes(config, workload, micro_step=micro_step, rank=rank)
    lengths = [sequence_length(config, workload, step=step, index=index) for index in indexes]
    if longest:
        lengths = [workload.longest(config)] * len(indexes)
        if config.batching != "packed" and (len(indexes) > 1 or config.batching == "padded"):
            lengths[-1] = max(1, lengths[-1] - 1)
    sequences = [
        torch.from_numpy(sequence(workload.seed, step, index, length, vocab_size))
        for index, length in zip(indexes, lengths, strict=True)
    ]
    return collated(sequences, config.batching, config.sequence_length)


def sequence_length(config: TrialConfig, workload: Workload, *, step: int, index: int) -> int:
    """Tokens of a sequence of an optimizer step, drawn from the workload's lengths; the same in every split."""
    seed = np.random.SeedSequence((workload.seed, step, index, LENGTH_STREAM))
    generator = np.random.Generator(np.random.Philox(seed))
    return min(workload.lengths[int(generator.integers(len(workload.lengths)))], config.sequence_length)
