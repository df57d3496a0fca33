"""Measured grids as samplers meet them: what ran, what did not fit, and what is predicted of each config.

The grid is `nanotron_bench_final2.csv`, the Ultra-Scale Playbook's sweep. A scenario is (model, key heads, vocabulary,
GPUs) at a global batch of 256 with at least 50 configs, ten of which ran. Of a config's repeats the one that ran
counts, then the newest. `ok_then_oom` is out of memory: one rank logged a result before another died. Predictions are
those of `autotune.predict` under the profile nanotron-checked.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from foreign import nanotron_case
from foreign_time import cluster_of, layout_of
from numpy.typing import NDArray

from autotune.predict.cases import MEMORY_HEADROOM
from autotune.predict.layout_times import STEP_PROFILES, Layouts, predict_layouts
from autotune.predict.layouts import TRAINER_PROFILES, Layout, impossible, predict_layout
from autotune.predict.shape import DecoderShape, read_shape
from autotune.search.candidates import Candidates, Observed
from autotune.search.step_parts import step_columns
from autotune.units import GIB

Row = dict[str, str]
Values = NDArray[np.float64]

GLOBAL_BATCH = 256
SMALLEST_SCENARIO, FEWEST_THAT_RAN = 50, 10
RESERVED_DEVIATION = 0.08
"""Of reserved bytes as a measure of what is needed: as much as fragmentation leaves a prediction open
(`predict.layouts.DEVIATION`)."""

_PROFILE = "nanotron-checked"
_COUNTS = ("tp", "pp", "dp", "micro_batch", "grad_accum")


class Scenario(Protocol):
    """A measured grid as samplers meet it; `cpu_grid.py` has another."""

    @property
    def name(self) -> str:
        """For the report."""

    @property
    def rows(self) -> Sequence[Row]:
        """A row for each config."""

    @property
    def axes(self) -> list[str]:
        """The columns that tell the configs apart."""

    @property
    def throughput(self) -> Values:
        """(N,), 0 where a config is no valid best."""

    @property
    def startable(self) -> NDArray[np.int64]:
        """The configs that a study would offer."""

    @property
    def candidates(self) -> Candidates:
        """These with what is predicted of them."""

    def is_oom(self, index: int) -> bool:
        """Whether a config runs out of memory."""

    def seen(self, index: int, seed: int) -> float:
        """Throughput that a launch reports, 0 where it does not run."""

    def observed(self, candidate: int, index: int, seed: int) -> Observed:
        """What a launch of the candidate, config number `index`, teaches."""


@dataclass(frozen=True)
class Sweep:
    """One grid of the sweep."""

    name: str
    rows: list[Row]

    @property
    def gpus(self) -> int:
        """Of every config."""
        return int(float(self.rows[0]["n_gpus"]))

    @cached_property
    def throughput(self) -> Values:
        """(N,) tokens/s/GPU, 0 where it did not run."""
        return np.array([float(row["tokens_per_s_per_gpu"]) if row["outcome"] == "ok" else 0.0 for row in self.rows])

    @cached_property
    def axes(self) -> list[str]:
        """As few columns as tell the configs apart, in the order in which people choose them."""
        axes = ["tp", "pp", "micro_batch", "sharding"]
        for more in ("dp", "grad_accum"):
            if len({tuple(row[axis] for axis in axes) for row in self.rows}) < len(self.rows):
                axes.append(more)
        return axes

    def is_oom(self, index: int) -> bool:
        """Whether this config ran out of memory."""
        return self.rows[index]["outcome"] in ("oom", "ok_then_oom")

    def seen(self, index: int, seed: int) -> float:
        """Throughput that a launch of this config reports, 0 where it does not run."""
        return float(self.throughput[index])

    def observed(self, candidate: int, index: int, seed: int) -> Observed:
        """What a launch teaches; `candidate` is its place among those that can start."""
        if self.is_oom(index):
            return Observed(candidate=candidate, ran_out=True)
        if not self.throughput[index]:
            return Observed(candidate=candidate, failed=True)
        fullest, reserved, same = self.memory[candidate]
        text = self.rows[index]["peak_mem"]
        # The table has rank 0 alone: the fullest GPU's peak is known only where that is predicted to be rank 0's. And
        # what was reserved with room to spare is more than was needed; here all counts that runs.
        peak = float(text) * GIB + fullest - reserved if text and same else None
        measured = self.seen(index, seed)
        return Observed(candidate=candidate, throughput=measured, peak_bytes=peak, peak_deviation=RESERVED_DEVIATION)

    @cached_property
    def shape(self) -> DecoderShape:
        """The model's."""
        return read_shape("row", nanotron_case(self.rows[0])["model"])

    @cached_property
    def layouts(self) -> list[Layout]:
        """Of every config."""
        return [layout_of(row) for row in self.rows]

    @cached_property
    def startable(self) -> NDArray[np.int64]:
        """Configs that the trainer does not refuse."""
        profile = TRAINER_PROFILES[_PROFILE]
        return np.array(
            [
                index
                for index, layout in enumerate(self.layouts)
                if layout.gradient_accumulation_steps >= layout.pipeline_parallel_size - 1
                and impossible(self.shape, layout, profile) is None
            ],
            np.int64,
        )

    @cached_property
    def memory(self) -> list[tuple[float, float, bool]]:
        """Of every startable config: bytes of the fullest GPU, reserved bytes of rank 0, whether these are one GPU."""
        cluster, profile = cluster_of(self.rows[0]), TRAINER_PROFILES[_PROFILE]
        found: list[tuple[float, float, bool]] = []
        for index in self.startable:
            stages = predict_layout(self.shape, self.layouts[index], profile, cluster.gpu.name)
            fullest = max(stages, key=lambda stage: stage.device_used_bytes)
            found.append((fullest.device_used_bytes, stages[0].reserved_bytes, fullest is stages[0]))
        return found

    @cached_property
    def candidates(self) -> Candidates:
        """The startable configs with their predictions."""
        cluster = cluster_of(self.rows[0])
        layouts = [self.layouts[index] for index in self.startable]
        by_cost = TRAINER_PROFILES[_PROFILE].balances_by_cost
        times = predict_layouts(self.shape, Layouts.of(layouts), STEP_PROFILES[_PROFILE], cluster, by_cost=by_cost)
        shares, unknowns, issued = step_columns(times)
        sizes = [
            (
                one.tensor_parallel_size,
                one.pipeline_parallel_size,
                one.data_parallel_size,
                one.micro_batch_size,
                one.gradient_accumulation_steps,
                2**one.zero_stage,
            )
            for one in layouts
        ]
        stage = predict_layout(self.shape, layouts[0], TRAINER_PROFILES[_PROFILE], cluster.gpu.name)[0]
        return Candidates(
            features=np.log2(np.array(sizes, float)),
            throughput=times.tokens_per_second_per_gpu,
            shares=shares,
            unknowns=unknowns,
            issued=issued,
            peak_bytes=np.array([peak for peak, _, _ in self.memory], float),
            peak_deviation=np.full(len(layouts), stage.deviation),
            capacity_bytes=(1 - MEMORY_HEADROOM) * cluster.memory_bytes,
            cost=np.ones(len(layouts)),
        )


def read_scenarios(rows: Iterable[Row]) -> list[Sweep]:
    """Grids that are large enough."""
    grids: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = defaultdict(dict)
    for row in rows:
        if not row["global_batch"] or float(row["global_batch"]) != GLOBAL_BATCH:
            continue
        grid = grids[row["model"], row["kv_heads"], row["vocab"], row["n_gpus"]]
        row = row | {key: str(int(float(row[key]))) for key in _COUNTS}  # some tables write 16 as 16.0
        config = tuple(row[key] for key in (*_COUNTS, "sharding"))
        if config not in grid or _precedence(row) > _precedence(grid[config]):
            grid[config] = row
    found = []
    for key in sorted(grids, key=lambda key: (key[:3], int(float(key[3])))):
        kept = [grids[key][config] for config in sorted(grids[key])]
        if len(kept) >= SMALLEST_SCENARIO and sum(row["outcome"] == "ok" for row in kept) >= FEWEST_THAT_RAN:
            found.append(Sweep(" ".join(key), kept))
    return found


def _precedence(row: Row) -> tuple[bool, int]:
    return row["outcome"] == "ok", int(float(row["job_id"] or 0))
