"""What the outcome of a trial teaches the posterior."""

from autotune.results import UNSTABLE
from autotune.search.candidates import MEMORY_NOISE, Observed
from autotune.spec.outcome import FailureKind, Measurement, Outcome

RESERVED_DEVIATION = 0.08
"""Of what is used as a measure of what is needed, where an allocator keeps what it could give back."""
FAILED = UNSTABLE | {FailureKind.INVALID_CONFIG, FailureKind.HOST_OUT_OF_MEMORY, FailureKind.TIMEOUT}
"""Failures that make a config's neighbours suspect."""


def observation(candidate: int, outcome: Outcome) -> Observed | None:
    """What an outcome teaches about its candidate; None where it teaches nothing."""
    if isinstance(outcome, Measurement):
        cached = outcome.peak_memory_reserved_bytes > outcome.peak_memory_allocated_bytes
        return Observed(
            candidate=candidate,
            throughput=outcome.tokens_per_second_per_gpu,
            peak_bytes=float(outcome.peak_device_used_bytes),
            peak_deviation=RESERVED_DEVIATION if cached else MEMORY_NOISE,
        )
    if outcome.kind is FailureKind.STOPPED_EARLY:
        peak = outcome.peak_device_used_bytes
        return Observed(
            candidate=candidate,
            at_most=outcome.most_tokens_per_second_per_gpu,
            peak_bytes=None if peak is None else float(peak),
            peak_deviation=RESERVED_DEVIATION,
        )
    if outcome.kind is FailureKind.OUT_OF_MEMORY:
        return Observed(candidate=candidate, ran_out=True)
    return Observed(candidate=candidate, failed=True) if outcome.kind in FAILED else None
