"""What one optimizer step must do, whatever the config, and how a trial measures it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from autotune.spec.config import TrialConfig

LENGTHS = 512
"""Of sequences, that stand for a data set's."""


def lognormal_lengths(median: float, sigma: float) -> tuple[int, ...]:
    """`LENGTHS` lengths in tokens at even quantiles of a lognormal distribution, ascending.

    Args:
        median: tokens.
        sigma: standard deviation of the natural logarithm.
    """
    normal = NormalDist(math.log(median), sigma)
    return tuple(max(1, round(math.exp(normal.inv_cdf((i + 0.5) / LENGTHS)))) for i in range(LENGTHS))


def typical_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """At most `LENGTHS` of many lengths, at even quantiles, ascending; the longest is among them."""
    ordered = sorted(lengths)
    if len(ordered) <= LENGTHS:
        return tuple(ordered)
    middles = [ordered[int((i + 0.5) * len(ordered) / LENGTHS)] for i in range(LENGTHS - 1)]
    return (*middles, ordered[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The fixed work of one optimizer step. Configs differ only in how they do it."""

    global_batch_size: int
    """Sequences per optimizer step over all ranks."""
    learning_rate: float = 1e-5
    """AdamW's step size. It does not change speed or memory; it keeps the loss of random weights finite."""
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    """Global norm to which gradients are clipped, as the Hugging Face Trainer does by default."""
    seed: int = 1
    lengths: tuple[int, ...] = ()
    """Tokens of sequences as frequent as those of the data, ascending; longer ones than a config's are cut. Empty: all
    have the config's length."""

    def gradient_accumulation_steps(self, config: TrialConfig) -> int:
        """Micro-batches per optimizer step and data-parallel rank: global batch / (micro-batch x data-parallel ranks).

        Raises:
            ValueError: the GPUs or the global batch do not divide; the message shows every term.
        """
        if config.gpus % config.model_parallel_size:
            raise ValueError(
                f"gpus {config.gpus} is no multiple of tensor_parallel_size {config.tensor_parallel_size}"
                f" x sequence_parallel_size {config.sequence_parallel_size}"
                f" x pipeline_parallel_size {config.pipeline_parallel_size} = {config.model_parallel_size}"
            )
        per_pass = config.micro_batch_size * config.data_parallel_size
        steps, rest = divmod(self.global_batch_size, per_pass)
        if rest or not steps:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of "
                f"micro_batch_size {config.micro_batch_size}"
                f" x data_parallel_size {config.data_parallel_size} = {per_pass}"
            )
        return steps

    def micro_steps(self, config: TrialConfig) -> int:
        """Forward and backward passes that an optimizer step asks an engine for: one a micro-batch, or a single one
        where a pipeline runs all of them.

        Raises:
            ValueError: the GPUs or the global batch do not divide.
        """
        steps = self.gradient_accumulation_steps(config)
        return 1 if config.pipeline_parallel_size > 1 else steps

    def tokens_per_step(self, config: TrialConfig) -> int:
        """Tokens that one optimizer step trains on, over all ranks; where lengths differ the expected number."""
        return round(self.global_batch_size * self.mean_length(config))

    def mean_length(self, config: TrialConfig) -> float:
        """Tokens of a sequence, padding left out."""
        return fmean(self._cut(config)) if self.lengths else float(config.sequence_length)

    def longest(self, config: TrialConfig) -> int:
        """Tokens of the longest sequence."""
        return self._cut(config)[-1] if self.lengths else config.sequence_length

    def largest_shape(self, config: TrialConfig) -> tuple[int, int]:
        """(rows, tokens of a row) of the micro-batch that needs most memory: all of its sequences are the longest."""
        return self._shape(config, float(self.longest(config)))

    def expected_shape(self, config: TrialConfig) -> tuple[int, int]:
        """(rows, tokens of a row) of an average micro-batch, padding included.

        The longest of n sequences: with lengths l_1 <= ... <= l_m, all as likely, it is l_i with the probability
        (i^n - (i - 1)^n) / m^n.
        """
        if config.batching != "dynamic_padding":
            return self._shape(config, self.mean_length(config))
        lengths, n = self._cut(config), config.micro_batch_size
        below = [(i / len(lengths)) ** n for i in range(len(lengths) + 1)]
        expected = sum(length * (below[i + 1] - below[i]) for i, length in enumerate(lengths))
        return self._shape(config, expected)

    def _shape(self, config: TrialConfig, length: float) -> tuple[int, int]:
        if config.batching == "packed":
            return 1, round(config.micro_batch_size * length)
        return config.micro_batch_size, config.sequence_length if config.batching == "padded" else round(length)

    def _cut(self, config: TrialConfig) -> list[int]:
        return [min(length, config.sequence_length) for length in self.lengths]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureSettings:
    """How long a screening trial measures."""

    warmup: int = 1
    """Full optimizer cycles before the clock starts: they allocate Adam's state and communicators and tune kernels."""
    micro_steps: int = 6
    """Micro-steps measured in all, at least two of them ending in an optimizer update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRunSettings:
    """What a run that confirms a config does after the warm-up, besides measuring as a screening trial does not."""

    steps: int
    """Whole optimizer steps that count; one more runs before them."""
    evaluate: bool = False
    """One forward pass without gradients follows."""
    save: bool = False
    """And one checkpoint, which is deleted."""
