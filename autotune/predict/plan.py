"""`Plan`: what every legal candidate of a search space will need and how fast it should be, without a device.

Candidates are predicted in columns. A structure (`autotune.predict.memory`) is traced once, and tells all candidates
that differ in batch alone. DeepSpeed keys would multiply the structures; what a value of a key adds or saves is traced
once for each engine, stage and offload instead, and added up. A single config (`predict_memory`) is always traced as it
is.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from autotune.errors import InvalidModelError, UnknownHardwareError
from autotune.predict.machine import MachineRates, machine_rates
from autotune.predict.machine_times import Kinds
from autotune.predict.memory import context_bytes, deviation, predict_memory, streams_of
from autotune.predict.shape import read_shape
from autotune.predict.step import StepTimes
from autotune.predict.stream import fragmentation_bytes
from autotune.predict.throughput import predict_trials
from autotune.predict.tracing import OnTraced, micro_steps, structures_of, trace_structures
from autotune.predict.trials import Trials
from autotune.space.space import Space
from autotune.spec.config import TrialConfig
from autotune.spec.prediction import Prediction

SURE = 0.01
"""A candidate that fits with less than this probability is not worth a launch."""

KEY_DEVIATION = 0.02
"""A ratio: how far a peak may be off when DeepSpeed keys have other values than those that it was traced with whole."""


UNSPLIT = {"tensor_parallel_size": 1, "sequence_parallel_size": 1, "pipeline_parallel_size": 1, "loss": "full_logits"}
"""The axes of layouts, with the values of a model and a loss that are not split."""


@dataclass(frozen=True)
class Plan:
    """The legal candidates of a space with the device memory that each will use."""

    space: Space
    device_used_bytes: NDArray[np.float64]
    """(candidates,), in their order: predicted peak of the fullest rank; NaN where it cannot be predicted."""
    deviations: NDArray[np.float64]
    """(candidates,): standard deviation of the peak, as a ratio of it."""
    unpredicted: Counter[str]
    """Why candidates cannot be predicted, and how many."""
    baseline: Prediction | None
    """Of the file's baseline, which need not be among the candidates."""
    times: StepTimes | None
    """Of the candidates; None where they are not known."""
    untimed: str | None
    """Why they are not."""

    @property
    def fits(self) -> NDArray[np.bool_]:
        """(candidates,): the predicted peak leaves the headroom free."""
        return self.device_used_bytes <= self.space.usable_bytes

    @property
    def too_big(self) -> NDArray[np.bool_]:
        """(candidates,): it does not. A candidate that cannot be predicted is neither."""
        return self.device_used_bytes > self.space.usable_bytes

    @property
    def knows_memory(self) -> bool:
        """Whether any candidate's peak is predicted."""
        return not bool(np.isnan(self.device_used_bytes).all())

    @functools.cached_property
    def surely_too_big(self) -> NDArray[np.bool_]:
        """(candidates,): fits with less than `SURE`, the error taken as normal. A launch would teach nothing."""
        margin = 1 + NormalDist().inv_cdf(SURE) * self.deviations
        return self.device_used_bytes * margin > self.space.usable_bytes

    def smallest(self, count: int) -> list[int]:
        """Indexes of the candidates that fit and need least, the least first, the best of each kind.

        A kind is what differs only in precision, attention and DeepSpeed keys.
        """
        return self._best(self.device_used_bytes, count)

    def fastest(self, count: int) -> list[int]:
        """Indexes of the candidates that fit and should be fastest, the fastest first, the best of each kind; none
        where times are not known.
        """
        return [] if self.times is None else self._best(-self.times.tokens_per_second_per_gpu, count)

    def _best(self, cost: NDArray[np.float64], count: int) -> list[int]:
        aside = ("precision", "attention")
        kinds = self.space.columns.kinds(axis for axis in _main_axes(self.space) if axis not in aside)
        order = np.argsort(np.where(self.fits, cost, np.inf), kind="stable")
        _, firsts = np.unique(kinds[order], return_index=True)
        return [int(at) for at in order[np.sort(firsts)] if self.fits[at]][:count]

    def of(self, config: TrialConfig) -> Prediction | None:
        """What is predicted of one config; None where nothing is, or where the plan does not know it."""
        if config == self.space.baseline and self.baseline is not None:
            return self.baseline
        try:
            at = self.space.candidates.index(config)
        except ValueError:
            return None
        if np.isnan(self.device_used_bytes[at]):
            return None
        time = None if self.times is None else self.times.at(at)
        issued = None if self.times is None or self.times.issue_seconds is None else self.times.issue_seconds[at]
        return Prediction(
            device_used_bytes=round(float(self.device_used_bytes[at])),
            deviation=float(self.deviations[at]),
            tokens_per_second_per_gpu=None if time is None else time.tokens_per_second_per_gpu,
            parts=None if time is None else {part.value: seconds for part, seconds in time.breakdown.items()},
            issue_seconds=None if issued is None else float(issued),
        )


def plan_memory(
    space: Space,
    on_traced: OnTraced = lambda done, total: None,
    on_measure: Callable[[], None] = lambda: None,
    *,
    rates: MachineRates | None = None,
) -> Plan:
    """Predict every legal candidate. Structures that no earlier plan has traced are traced now, on all cores.

    Args:
        space: with its cluster.
        on_traced: told of each structure that is traced.
        on_measure: called before this machine is measured.
        rates: of a cluster of CPUs; without them this machine is taken to be one of its nodes, and measured.
    """
    if space.file.script is not None and space.file.script.predict_as is None:
        return _unpredicted(space)
    cells = _Cells(space)
    effects = _KeyEffects(space, cells)
    baseline = space.baseline
    wanted = [cells.structures, *effects.structures, [structures_of(space, baseline)] if baseline else []]
    on_processors = space.cluster.device == "cpu"
    untimed = _uncounted_layouts(space) if on_processors else None
    kinds = Kinds(space) if on_processors and untimed is None else None
    counted = set() if kinds is None else kinds.names
    reasons = trace_structures(
        {name for found in wanted for names in found for name in names}, on_traced, counted=counted
    )
    peaks, unpredicted = cells.peaks(reasons)
    added, uncertain, moved = effects.added(reasons)
    used = peaks + added
    lost = np.isnan(added) & ~np.isnan(peaks)
    if lost.any():
        unpredicted[effects.why_lost(reasons)] += int(lost.sum())
    spread = np.array([deviation(space.cluster, compiled=bool(value)) for value in space.axes["torch_compile"]])
    traced = spread[space.columns["torch_compile"]]
    deviations = np.hypot(np.hypot(traced, KEY_DEVIATION * moved), uncertain / used)
    times: StepTimes | None = None
    speed: float | None = None
    if untimed is not None:
        pass
    elif kinds is None:
        times, untimed = _times(space)
        if times is not None and baseline is not None:
            speed = _speed(space, baseline)
    else:
        times, speed, untimed = _processor_times(space, kinds, rates, reasons, on_measure)
    stated = None
    if baseline is not None and not any(name in reasons for name in structures_of(space, baseline)):
        whole = predict_memory(baseline, space.model, space.workload, space.cluster)
        stated = Prediction(
            device_used_bytes=whole.device_used_bytes,
            deviation=whole.deviation,
            tokens_per_second_per_gpu=speed,
        )
    return Plan(space, used, deviations, unpredicted, stated, times, untimed)


def _unpredicted(space: Space) -> Plan:
    """The plan of the user's own script, of which nothing is known: ours may need less than it does, or more."""
    count, reason = len(space.candidates), "they run a script; script.predict_as: engine takes it to do what ours do"
    unknown = np.full(count, np.nan)
    return Plan(space, unknown, np.zeros(count), Counter({reason: count}), None, None, reason)


def _uncounted_layouts(space: Space) -> str | None:
    """Why operators cannot be counted where some candidate's model, loss or rows are no whole ones; None: all are."""
    if any(space.used(axis) != (plain,) for axis, plain in UNSPLIT.items()):
        return "steps of split models are predicted on GPUs alone"
    if "packed" in space.used("batching"):
        return "steps of packed batches are predicted on GPUs alone"
    return None


def _times(space: Space) -> tuple[StepTimes | None, str | None]:
    """Step times of the candidates, or why they are not known."""
    try:
        shape = read_shape(space.model.name, space.model.config)
        if not shape.dense or len(set(shape.layers)) > 1:
            return None, f"times are predicted for dense models with equal layers, which {space.model.name} is not"
        trials, kinds = Trials.of_candidates(space, shape)
        return predict_trials(shape, trials, space.cluster).of(kinds), None
    except (InvalidModelError, UnknownHardwareError) as error:
        return None, str(error)


def _processor_times(
    space: Space,
    kinds: Kinds,
    rates: MachineRates | None,
    reasons: dict[str, str],
    on_measure: Callable[[], None],
) -> tuple[StepTimes | None, float | None, str | None]:
    """Step times of the candidates, throughput of the baseline, or why they are not known."""
    uncounted = next((reasons[name] for name in sorted(kinds.names) if name in reasons), None)
    if uncounted is not None:
        return None, None, f"the operators of some candidates cannot be counted: {uncounted}"
    precisions = [str(precision) for precision in space.used("precision")]

    def measured(ranks: int) -> MachineRates:
        return machine_rates(ranks, precisions, on_measure) if rates is None else rates

    try:
        times, baseline = kinds.times(measured), kinds.baseline(measured)
    except UnknownHardwareError as error:
        return None, None, str(error)
    return times, None if baseline is None else baseline.at(0).tokens_per_second_per_gpu, None


def _speed(space: Space, config: TrialConfig) -> float:
    """Tokens per second and GPU of one config of a space whose times are known."""
    shape = read_shape(space.model.name, space.model.config)
    times = predict_trials(shape, Trials.of([config], space.workload, shape), space.cluster)
    return times.at(0).tokens_per_second_per_gpu


def _main_axes(space: Space) -> list[str]:
    """All but DeepSpeed keys."""
    return [axis for axis in space.axes if not axis.startswith("deepspeed.")]


class _Cells:
    """The candidates by structure. A cell is those that differ in batch and in DeepSpeed keys alone."""

    def __init__(self, space: Space) -> None:
        self._space = space
        columns = space.columns
        self._batch = np.array(space.axes["micro_batch_size"], np.int64)[columns["micro_batch_size"]]
        kinds = columns.kinds(axis for axis in _main_axes(space) if axis != "micro_batch_size")
        # A sequence alone is never padded, and has no mask (`TrialConfig.is_never_padded`).
        alone = (self._batch == 1) & (space.axes["batching"] != ("fixed",))
        code = 2 * ((self._batches().max() + 1) * kinds + self._batches()) + alone
        # The first candidate of a cell has the first value of every key.
        _, firsts, self.of = np.unique(code, return_index=True, return_inverse=True)
        self.examples: list[TrialConfig] = [space.candidates[int(at)] for at in firsts]
        """A config of each cell."""
        self.structures = [structures_of(space, config) for config in self.examples]

    def peaks(self, reasons: dict[str, str]) -> tuple[NDArray[np.float64], Counter[str]]:
        """Peak bytes (candidates,) with the first value of each key, NaN where unknown; and why how many are."""
        peaks = np.full(len(self.of), np.nan)
        unpredicted: Counter[str] = Counter()
        order = np.argsort(self.of, kind="stable")
        members = np.split(order, np.flatnonzero(np.diff(self.of[order])) + 1)
        for example, names, those in zip(self.examples, self.structures, members, strict=True):
            reason = next((reasons[name] for name in names if name in reasons), None)
            if reason is not None:
                unpredicted[reason] += len(those)
                continue
            batches, which = np.unique(self._batch[those], return_inverse=True)
            peaks[those] = _peak_bytes(self._space, example, names, batches)[which]
        return peaks, unpredicted

    def _batches(self) -> NDArray[np.int64]:
        """(candidates,): micro-batches of an optimizer step; without a pipeline two stand for all numbers above."""
        space, columns = self._space, self._space.columns

        def values(axis: str) -> NDArray[np.int64]:
            found: NDArray[np.int64] = np.array(space.axes[axis], np.int64)[columns[axis]]
            return found

        pipeline = values("pipeline_parallel_size")
        processes = np.where(np.array(space.axes["device_map"])[columns["device_map"]] == "auto", 1, values("gpus"))
        ranks = processes // (values("tensor_parallel_size") * values("sequence_parallel_size") * pipeline)
        steps: NDArray[np.int64] = space.workload.global_batch_size // (self._batch * ranks)
        return np.where(pipeline > 1, steps, np.minimum(steps, 2))


class _KeyEffects:
    """What each value of a DeepSpeed key adds to the peak, where sharding's buffers weigh most: with full activation
    checkpointing, if the space has it, and the smallest batch.
    """

    def __init__(self, space: Space, cells: _Cells) -> None:
        self._space = space
        groups: dict[tuple[object, ...], int] = {}
        self._group_of_cell = np.zeros(len(cells.examples), np.int64)
        examples: list[TrialConfig] = []
        for cell, config in enumerate(cells.examples):
            group = groups.setdefault((config.engine, config.zero_stage, config.offload, config.gpus), len(groups))
            self._group_of_cell[cell] = group
            if group == len(examples):
                examples.append(config)
            examples[group] = min(examples[group], config, key=_activations)
        self._cell_of = cells.of
        self._examples = examples
        self._base = [structures_of(space, config) for config in examples]
        self._moved: dict[str, list[list[tuple[TrialConfig, tuple[str, ...]] | None]]] = {}
        for axis in space.axes:
            if axis.startswith("deepspeed.") and len(space.axes[axis]) > 1:
                self._moved[axis] = [self._steps(axis, config) for config in examples]

    @property
    def structures(self) -> Iterable[Sequence[tuple[str, ...]]]:
        """What has to be traced."""
        yield self._base
        for rows in self._moved.values():
            for row in rows:
                yield [moved[1] for moved in row if moved is not None]

    def added(self, reasons: dict[str, str]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """(candidates,) each: bytes that the keys add, the standard deviation of that, and whether any key has moved.

        Where the peak is at another place of the step than in the traced example, a key adds anything from nothing to
        all; and one that adds nothing there may do so here.
        """
        count = len(self._cell_of)
        added, uncertain, moved_away = np.zeros(count), np.zeros(count), np.zeros(count, np.bool_)
        group_of = self._group_of_cell[self._cell_of]
        for axis, rows in self._moved.items():
            table = np.zeros((len(rows), len(self._space.axes[axis])))
            for group, row in enumerate(rows):
                for at, moved in enumerate(row):
                    table[group, at] = self._difference(group, moved, reasons)
            column = self._space.columns[axis]
            effect = table[group_of, np.maximum(column, 0)]
            added += effect
            uncertain = np.hypot(uncertain, effect / 2)
            moved_away |= column > 0
        return added, uncertain, moved_away

    def why_lost(self, reasons: dict[str, str]) -> str:
        """Why the effect of some value of a key is not known; of several reasons, one."""
        return next(reasons[name] for found in self.structures for names in found for name in names if name in reasons)

    def _steps(self, axis: str, config: TrialConfig) -> list[tuple[TrialConfig, tuple[str, ...]] | None]:
        """The config with each value of the key; None for the one it has, or where the key does not apply."""
        key = axis.removeprefix("deepspeed.")
        stated = dict(config.deepspeed)
        steps: list[tuple[TrialConfig, tuple[str, ...]] | None] = []
        for value in self._space.axes[axis]:
            moved = replace(config, deepspeed=tuple((stated | {key: value}).items())) if key in stated else config
            steps.append(None if moved == config else (moved, structures_of(self._space, moved)))
        return steps

    def _difference(
        self, group: int, moved: tuple[TrialConfig, tuple[str, ...]] | None, reasons: dict[str, str]
    ) -> float:
        if moved is None:
            return 0.0
        config, names = moved
        base = self._base[group]
        if any(name in reasons for name in (*names, *base)):
            return 0.0 if any(name in reasons for name in base) else float("nan")
        batch = np.array([config.micro_batch_size])
        with_it = _peak_bytes(self._space, config, names, batch)
        without = _peak_bytes(self._space, self._examples[group], base, batch)
        return float(with_it[0] - without[0])


def _activations(config: TrialConfig) -> tuple[int, int]:
    """Orders configs by how many activations they keep."""
    return ("full", "selective", "selective_ops", "none").index(
        config.activation_checkpointing
    ), config.micro_batch_size


def _peak_bytes(
    space: Space, example: TrialConfig, names: tuple[str, ...], batches: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Device bytes at each batch size (batches,), of the fullest rank."""
    shapes = [space.workload.largest_shape(replace(example, micro_batch_size=int(batch))) for batch in batches]
    rows, length = np.array(shapes).T
    device = space.cluster.device
    streams = streams_of(names, example, micro_steps(space, example))
    live = np.stack([ranks.peak_bytes(rows, length, device) for ranks in streams])
    kept = np.stack([fragmentation_bytes(ranks, rows, length, device) for ranks in streams])
    fullest = live.argmax(axis=0), np.arange(len(batches))
    peaks: NDArray[np.float64] = live[fullest] + kept[fullest] + context_bytes(example, space.cluster)
    return peaks
