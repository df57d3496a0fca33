"""Step times on this machine's processors: the operators of each candidate's step at the rates of the self-benchmark.

    step = (g - 1) x micro-step + last micro-step + update

of which each is the sum over its operators of what one takes, and of the time to dispatch them. Nothing overlaps:
processors work on one operator at a time, and collectives need the same cores.

Left out: Python that dispatches nothing (hooks of DeepSpeed and FSDP2 between operators), and clocks that change.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autotune.errors import UnknownHardwareError
from autotune.predict.machine import MachineRates
from autotune.predict.operators import COLLECTIVES, Operators, Phase, Row, Work, operators, operators_name
from autotune.predict.roofline import Parts, TimePart
from autotune.predict.step import StepTimes
from autotune.space.space import Space
from autotune.spec.config import TrialConfig

RatesOf = Callable[[int], MachineRates]
"""Ranks of a trial to the rates that each of them has."""

_PARTS = {
    Work.PRODUCT: TimePart.MATMUL,
    Work.ATTENTION: TimePart.ATTENTION,
    Work.ATTENTION_BACKWARD: TimePart.ATTENTION,
    Work.MOVED: TimePart.ELEMENTWISE,
    Work.CALL: TimePart.LAUNCH,
    Work.SHARDED_CALL: TimePart.LAUNCH,
    Work.ALL_REDUCE: TimePart.GRADIENT_REDUCTION,
    Work.REDUCE_SCATTER: TimePart.GRADIENT_REDUCTION,
    Work.ALL_GATHER: TimePart.PARAMETER_GATHER,
    Work.BROADCAST: TimePart.PARAMETER_GATHER,
}
PARTS = (*dict.fromkeys(_PARTS.values()), TimePart.OPTIMIZER)


class Kinds:
    """The candidates of a space by what their operators are: alike are those that differ in the micro-batch alone.

    DeepSpeed keys are taken to make no difference to the time; those of the first candidate of a kind are counted.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        aside = ("micro_batch_size",)
        axes = [axis for axis in space.axes if not axis.startswith("deepspeed.") and axis not in aside]
        _, firsts, self._of = np.unique(space.columns.kinds(axes), return_index=True, return_inverse=True)
        self._examples = [space.candidates[int(at)] for at in firsts]
        self._names = [operators_name(space.model, config) for config in self._examples]
        baseline = space.baseline
        self._baseline = None if baseline is None else operators_name(space.model, baseline)

    @property
    def names(self) -> set[str]:
        """Whose operators have to be counted, the baseline's included."""
        return {*self._names, *([] if self._baseline is None else [self._baseline])}

    def times(self, rates: RatesOf) -> StepTimes:
        """Of the candidates.

        Raises:
            UnknownHardwareError: the network that a candidate needs is not known.
        """
        space, count = self._space, len(self._of)
        batches = np.array(space.axes["micro_batch_size"], np.int64)[space.columns["micro_batch_size"]]
        gpus = np.array(space.axes["gpus"], np.int64)[space.columns["gpus"]]
        steps = space.workload.global_batch_size // (batches * gpus)
        parts = {part: np.zeros(count) for part in PARTS}
        for kind, (example, name) in enumerate(zip(self._examples, self._names, strict=True)):
            those = self._of == kind
            rows = _rows(space, example, batches[those])
            for part, seconds in _parts(space, example, name, rates, rows, steps[those]).items():
                parts[part][those] = seconds
        return _step_times(space, parts, batches * steps)

    def baseline(self, rates: RatesOf) -> StepTimes | None:
        """Of the file's baseline; None where it has none."""
        config = self._space.baseline
        if config is None or self._baseline is None:
            return None
        batch, steps = config.micro_batch_size, self._space.workload.gradient_accumulation_steps(config)
        rows = _rows(self._space, config, np.array([batch]))
        parts = _parts(self._space, config, self._baseline, rates, rows, np.array([steps]))
        return _step_times(self._space, parts, np.array([batch * steps]))


def _parts(
    space: Space,
    config: TrialConfig,
    name: str,
    rates: RatesOf,
    rows: NDArray[np.float64],
    steps: NDArray[np.int64],
) -> Parts:
    if config.gpus > space.cluster.gpus_per_node:
        raise UnknownHardwareError("how fast the network between nodes without GPUs is is not known")
    return step_parts(operators(name), rates(config.gpus), rows, steps)


def _rows(space: Space, example: TrialConfig, batches: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows of the counted length that have as many tokens, padding included, as an average micro-batch of each size."""
    sizes, which = np.unique(batches, return_inverse=True)
    shapes = [space.workload.expected_shape(replace(example, micro_batch_size=int(size))) for size in sizes]
    return np.array([rows * length / example.sequence_length for rows, length in shapes])[which]


def _step_times(space: Space, parts: Parts, sequences: NDArray[np.int64]) -> StepTimes:
    length = space.workload.mean_length(space.candidates[0])
    count = len(sequences)
    flops = np.full(count, float(space.model.flops_per_token(space.file.workload.sequence_length)))
    return StepTimes(parts, (sequences * length).astype(float), flops, np.full(count, np.nan))


def step_parts(
    operators: Operators, rates: MachineRates, micro_batch: NDArray[np.float64], accumulation: NDArray[np.int64]
) -> Parts:
    """Seconds of a step's parts.

    Args:
        operators: of the structure.
        rates: of the machine.
        micro_batch: sizes (B,).
        accumulation: micro-steps of an optimizer step (B,).
    """
    often: dict[Phase, NDArray[np.int64]] = {
        "micro_step": accumulation - 1,
        "last_micro_step": np.ones_like(accumulation),
        "update": np.ones_like(accumulation),
    }
    parts = {part: np.zeros(len(micro_batch)) for part in PARTS}
    for row in operators.rows:
        part = _PARTS[row.work]
        if row.phase == "update" and row.work not in COLLECTIVES:
            part = TimePart.OPTIMIZER
        parts[part] = parts[part] + often[row.phase] * row.count * _one(row, rates, micro_batch)
    return parts


def _one(row: Row, rates: MachineRates, micro_batch: NDArray[np.float64]) -> NDArray[np.float64] | float:
    if row.work is Work.CALL:
        return rates.call_seconds
    if row.work is Work.SHARDED_CALL:
        return rates.sharded_call_seconds
    return rates.seconds(row.work.value, row.dtype, row.size(micro_batch))
