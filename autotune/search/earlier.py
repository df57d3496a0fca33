"""What earlier studies in the same store teach a study: trials on equal hardware and software, of any size of model.

What a formula gets wrong on some hardware it gets wrong for other models, lengths and numbers of GPUs as well: each
earlier trial is a row of the posterior with its own prediction and what was measured against it. It is believed less
than a trial of the study itself (`EARLIER_DEVIATION`), and less the further its features are away.

Left out: trials whose predictions were stored without the parts of their steps, by versions before this one or where
times are not predicted; and failures other than of memory.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autotune.errors import InvalidSpaceError, StoreError
from autotune.predict.plan import Plan
from autotune.predict.roofline import TimePart, total
from autotune.predict.step import StepTimes
from autotune.results import standing_results
from autotune.search.candidates import Candidates, Observed
from autotune.search.columns import context_of, rows_of
from autotune.search.lessons import observation
from autotune.search.step_parts import network_parts, step_columns
from autotune.space.space import Space, stored_space
from autotune.spec.outcome import Measurement
from autotune.spec.prediction import Prediction
from autotune.spec.record import StudyRecord, TrialRecord
from autotune.trial.environment import environment


class Store(Protocol):
    """What is read of a database."""

    def studies(self) -> list[StudyRecord]:
        """Every study."""

    def trials(self, study: str) -> list[TrialRecord]:
        """Of one study."""


_Row = tuple[Space, TrialRecord, Observed]
"""A trial, the space that it ran in, and what it showed."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """Trials of earlier studies."""

    candidates: Candidates
    """Their configs; M rows beside those of the study's own candidates."""
    observed: tuple[Observed, ...]
    """What they showed, one for each row, which `candidate` is."""
    context: tuple[float, ...]
    """Of the study itself, see `context_of`."""
    network: tuple[int, ...]
    """Which parts of a step use the network."""
    elsewhere: NDArray[np.bool_]
    """(M,) those that ran inside one node where the study's trials do not all, or the other way round."""
    trials: Mapping[str, int]
    """How many of which study."""

    def behind(self, candidates: Candidates) -> tuple[Candidates, list[Observed]]:
        """The study's own candidates (N,) with the earlier configs behind them, and what these showed."""
        count = len(candidates.throughput)
        own = np.hstack([candidates.features, np.tile(np.array(self.context), (count, 1))])
        candidates, known = replace(candidates, features=own), self.candidates
        if len(np.unique(candidates.cost)) < 2:  # else the number of GPUs is an axis, and a feature already
            candidates, known = (replace(c, features=np.c_[c.features, np.log2(c.cost)]) for c in (candidates, known))
        together = candidates.before(known, self.network, self.elsewhere)
        return together, [replace(one, candidate=count + one.candidate) for one in self.observed]

    @property
    def words(self) -> str:
        """For people."""
        named = ", ".join(f"{count} of {study}" for study, count in self.trials.items())
        return f"begins with what {sum(self.trials.values())} trials on equal hardware and software taught: {named}"


def earlier_trials(store: Store, plan: Plan) -> Earlier | None:
    """What the store's other studies teach about a plan; None where they teach nothing."""
    space, times = plan.space, plan.times
    if times is None:
        return None
    here = _software(space)
    parts = [part.value for part in times.parts]
    rows: list[_Row] = []
    for record in store.studies():
        if record.name == space.name or (other := _comparable(record, space)) is None:
            continue
        trials = {trial.number: trial for trial in store.trials(record.name)}
        for number, _, outcome in standing_results(trials.values()):
            trial = trials[number]
            if isinstance(outcome, Measurement) and not _is_equal(outcome.ranks[0].environment, here):
                continue
            found = observation(0, outcome)
            if found is not None and not found.failed and _is_like(trial.prediction, times, parts):
                rows.append((other, trial, found))
    if not any(one.throughput is not None for _, _, one in rows):
        return None  # memory alone that ran out, under software that nobody knows
    observed = tuple(replace(one, candidate=row) for row, (_, _, one) in enumerate(rows))
    counts = Counter(other.name for other, _, _ in rows)
    node, largest = space.cluster.gpus_per_node, max(int(gpus) for gpus in space.used("gpus"))
    elsewhere = np.array([(trial.config.gpus > node) != (largest > node) for _, trial, _ in rows])
    network = tuple(network_parts(list(times.parts)))
    return Earlier(_candidates(space, parts, rows), observed, context_of(space), network, elsewhere, counts)


def _is_like(prediction: Prediction | None, times: StepTimes, parts: Sequence[str]) -> bool:
    """Whether a stored prediction tells as much as those of the plan."""
    if prediction is None or set(prediction.parts or {}) != set(parts):
        return False
    return (prediction.issue_seconds is None) == (times.issue_seconds is None)


def _candidates(space: Space, parts: Sequence[str], rows: Sequence[_Row]) -> Candidates:
    """Earlier trials in the columns of a space, with the predictions that were made of them."""
    predictions = [trial.prediction for _, trial, _ in rows if trial.prediction is not None]
    seconds = {TimePart(part): np.array([(one.parts or {})[part] for one in predictions], float) for part in parts}
    throughput = np.array([one.tokens_per_second_per_gpu for one in predictions], float)
    issue = [one.issue_seconds for one in predictions]
    ones = np.ones(len(throughput))
    times = StepTimes(
        seconds, throughput * total(seconds), ones, ones, None if None in issue else np.array(issue, float)
    )
    shares, unknowns, issued = step_columns(times)
    configs = [trial.config for _, trial, _ in rows]
    return Candidates(
        features=np.hstack([rows_of(space, configs), np.array([context_of(other) for other, _, _ in rows], float)]),
        throughput=throughput,
        shares=shares,
        unknowns=unknowns,
        issued=issued,
        peak_bytes=np.array([one.device_used_bytes for one in predictions], float),
        peak_deviation=np.array([one.deviation for one in predictions], float),
        capacity_bytes=space.usable_bytes,
        cost=np.array([config.gpus for config in configs], float),
    )


def _comparable(record: StudyRecord, space: Space) -> Space | None:
    """The space of a study of the same task on the same GPUs in the same nodes; None for any other."""
    try:
        other = stored_space(record)
    except (StoreError, InvalidSpaceError):  # of an older version
        return None
    mine, its = space.cluster, other.cluster
    same = (mine.gpu.name, mine.memory_bytes, mine.gpus_per_node) == (its.gpu.name, its.memory_bytes, its.gpus_per_node)
    alike = (space.file.task, space.file.method) == (other.file.task, other.file.method)
    return other if same and alike and (space.script, other.script) == (None, None) else None


def _software(space: Space) -> dict[str, str]:
    """Versions here, and on CPUs the processor; of GPUs the cluster's name has to do: the driver may have none."""
    found = environment("cpu")
    if space.cluster.device != "cpu":
        del found["device"]
    return found


def _is_equal(there: Mapping[str, str], here: Mapping[str, str]) -> bool:
    return all(there.get(key) == value for key, value in here.items())
