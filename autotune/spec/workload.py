"""What one optimizer step must do, whatever the config, and how a trial measures it."""

from dataclasses import dataclass

from autotune.spec.config import TrialConfig


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
        """Tokens that one optimizer step trains on, over all ranks."""
        return self.global_batch_size * config.sequence_length


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
