"""The synthetic global batch: the same sequences for every split over ranks and micro-batches.

Sequence i of optimizer step s depends on (seed, s, i) alone. Two configs of one study so train on equal data, and a
layout can be held against a single process: losses and gradient norms must agree (`tests/engines/test_parity.py`).
"""

import numpy as np
import torch

from autotune.spec.config import TrialConfig
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
