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
        """Micro-steps per optimizer step: global batch / (micro-batch x data-parallel ranks).

        Raises:
            ValueError: the global batch does not divide; the message shows every term.
        """
        per_pass = config.micro_batch_size * config.data_parallel_size
        steps, rest = divmod(self.global_batch_size, per_pass)
        if rest or not steps:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of "
                f"micro_batch_size {config.micro_batch_size}"
                f" x data_parallel_size {config.data_parallel_size} = {per_pass}"
            )
        return steps

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
