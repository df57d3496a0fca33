"""What the ranks measured -> `Measurement`, or how fast the config is at most where they stopped early."""

import statistics
from collections.abc import Sequence

from autotune.spec.adapters import flops_per_token
from autotune.spec.cluster import GpuSpec
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome, Phase, RankMeasurement
from autotune.spec.request import TrialRequest

OPTIMISM = 0.1
"""By how much faster than the fastest so far a micro-step may still turn out, as a ratio."""


def conclude(ranks: Sequence[RankMeasurement], request: TrialRequest, gpu: GpuSpec) -> Outcome:
    """What ranks that all delivered have found out: a measurement, or that they were stopped early."""
    if not any(rank.stopped_early for rank in ranks):
        return compose(ranks, request, gpu)
    config = request.config
    accumulation = request.timed_micro_steps
    least = max(least_step_seconds(r.micro_step_seconds, r.update_step_seconds, accumulation) for r in ranks)
    most = request.workload.tokens_per_step(config) / least / config.gpus
    # The optimizer's states are allocated by the first update: only a later one has all that is ever live at a time.
    has_peaked = request.measure.warmup > 1 or all(rank.update_step_seconds for rank in ranks)
    return Failure(
        kind=FailureKind.STOPPED_EARLY,
        phase=Phase.FORWARD,
        message=f"an optimizer step takes at least {least:.3g} s, too long to become the fastest",
        most_tokens_per_second_per_gpu=most,
        peak_device_used_bytes=max(rank.peak_device_used_bytes for rank in ranks) if has_peaked else None,
        phase_seconds=slowest([rank.phase_seconds for rank in ranks]),
    )


def compose(ranks: Sequence[RankMeasurement], request: TrialRequest, gpu: GpuSpec) -> Measurement:
    """Put the ranks' samples together. Times are of the slowest rank, memory of the fullest.

    With g micro-steps per optimizer step, of which the last one updates:

        step time = max over ranks of  (g - 1) x median(micro-steps) + median(update steps)
        tokens per second and GPU = tokens of a step / step time / GPUs
        model FLOPs utilization = FLOPs per token x tokens per second and GPU / dense peak of the GPU

    A long run has timed whole optimizer steps: its step time is their mean, each step as long as on its slowest rank.

    Left out: what happens once per many steps (saving, evaluating, loading data). Samples of different ranks are not
    matched up: the medians of one rank are added, then the slowest rank is taken. A pipeline's only micro-step is the
    whole step.
    """
    config = request.config
    accumulation = request.timed_micro_steps
    step_time = _whole_step_time(ranks) or max(_step_time(rank, accumulation) for rank in ranks)
    tokens = _tokens(ranks, request) / step_time / config.gpus
    peak = gpu.peak_flops_per_second.get(config.precision)
    return Measurement(
        step_time_seconds=step_time,
        tokens_per_second_per_gpu=tokens,
        model_flops_utilization=flops_per_token(request.model, config) * tokens / peak if peak else None,
        peak_memory_allocated_bytes=max(rank.peak_memory_allocated_bytes for rank in ranks),
        peak_memory_reserved_bytes=max(rank.peak_memory_reserved_bytes for rank in ranks),
        peak_device_used_bytes=max(rank.peak_device_used_bytes for rank in ranks),
        device_memory_bytes=min(rank.device_memory_bytes for rank in ranks),
        allocator_retries=max(rank.allocator_retries for rank in ranks),
        phase_seconds=slowest([rank.phase_seconds for rank in ranks]),
        ranks=tuple(ranks),
    )


def least_step_seconds(micro_steps: Sequence[float], updates: Sequence[float], accumulation: int) -> float:
    """An optimizer step is hardly shorter than this, by what was timed so far; 0.0 where that says nothing.

    (g - 1) of the fastest accumulating micro-step and one of the fastest that updates, which takes no less than one
    that accumulates; all faster by `OPTIMISM` still. A first sample that was slow by chance is so believed less.
    """
    micro = min(micro_steps, default=0.0)
    return (1 - OPTIMISM) * ((accumulation - 1) * micro + min(updates, default=micro))


def slowest(phase_seconds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Per phase the longest time of any rank."""
    names = dict.fromkeys(name for rank in phase_seconds for name in rank)
    return {name: max(rank.get(name, 0.0) for rank in phase_seconds) for name in names}


def _whole_step_time(ranks: Sequence[RankMeasurement]) -> float | None:
    whole = [rank.long_run.step_seconds for rank in ranks if rank.long_run is not None]
    return statistics.fmean(map(max, zip(*whole, strict=True))) if whole else None


def _tokens(ranks: Sequence[RankMeasurement], request: TrialRequest) -> float:
    """Tokens of an optimizer step, as put together as its time; ranks that share sequences count once."""
    counted = {request.config.data_parallel_rank(rank.rank): rank for rank in ranks}.values()
    found = [_own_tokens(rank, request.timed_micro_steps) for rank in counted]
    known = [tokens for tokens in found if tokens is not None]
    return sum(known) if len(known) == len(found) else request.workload.tokens_per_step(request.config)


def _own_tokens(rank: RankMeasurement, accumulation: int) -> float | None:
    """Of one rank; None where it did not count."""
    if rank.long_run is not None:
        return statistics.fmean(rank.long_run.step_tokens) if rank.long_run.step_tokens else None
    if not rank.update_step_tokens:
        return None
    micro = statistics.fmean(rank.micro_step_tokens) if rank.micro_step_tokens else 0.0
    return (accumulation - 1) * micro + statistics.fmean(rank.update_step_tokens)


def _step_time(rank: RankMeasurement, accumulation: int) -> float:
    # The median is no outlier's; where micro-steps differ in tokens, the mean goes with the mean of those.
    middle = (
        statistics.fmean
        if len({*rank.micro_step_tokens}) > 1 or len({*rank.update_step_tokens}) > 1
        else statistics.median
    )
    update = middle(rank.update_step_seconds)
    if accumulation == 1:
        return update
    return (accumulation - 1) * middle(rank.micro_step_seconds) + update
