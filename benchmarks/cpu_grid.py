"""How many launches does a sampler need on the CPU demo? Replays the recorded grid of `search_spaces/tiny-cpu.yaml`.

    python benchmarks/cpu_grid.py [--grid FILE] [--samplers plan,tpe,random] [--seeds N] [--budget 30] [--json]
    python benchmarks/cpu_grid.py --pack RAW --grid FILE

`record_cpu_grid.py` ran every candidate three times, without a limit. Here each worker has the demo's 48 MiB: a
config whose peak is larger runs out of memory, and one that leaves too little headroom runs and cannot win. A launch
reports one of the three runs, which one is drawn by the seed; regret is against the medians of three, so that a lucky
run is no discovery. `plan` has the memory that is predicted on any machine and the times that follow from the
self-benchmark stored in the grid's first line; `plan-untimed` has memory alone. Optuna's samplers propose as in
`replay.py`, which has the other rules.

`--pack` makes such a grid of what `record_cpu_grid.py` wrote, and runs the self-benchmark for it: do it on the same
machine, at once.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from replay import SAMPLERS, Launches, Search, replay, search_plan, show
from scenarios import Row
from threadpoolctl import threadpool_limits

from autotune.predict.machine import MachineRates, measure
from autotune.predict.plan import Plan, plan_memory
from autotune.search.candidates import Candidates, Observed
from autotune.search.columns import candidates_of
from autotune.space.space import Space, load_space
from autotune.spec.config import TrialConfig

Values = NDArray[np.float64]

ROOT = Path(__file__).parents[1]
GRID = Path(__file__).parent / "grids" / "tiny_cpu.jsonl"
GATES = {"regret_after_8": 0.05}


@dataclass(frozen=True)
class CpuGrid:
    """Every candidate of the demo, several times."""

    header: dict[str, Any]
    configs: tuple[TrialConfig, ...]
    step_seconds: Values
    """(configs, repeats)."""
    tokens_per_second_per_gpu: Values
    """(configs, repeats)."""
    peak_bytes: Values
    """(configs,)."""

    @property
    def rates(self) -> MachineRates:
        """Of the machine, as its self-benchmark found them after the recording."""
        return MachineRates.from_dict(self.header["self_benchmark"])

    @cached_property
    def space(self) -> Space:
        """The demo's."""
        return load_space(ROOT / "search_spaces" / self.header["space"])


def read_grid(path: Path) -> CpuGrid:
    """What `--pack` wrote."""
    header, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return CpuGrid(
        header,
        tuple(TrialConfig.from_dict(line["config"]) for line in lines),
        np.array([line["step_time_seconds"] for line in lines]),
        np.array([line["tokens_per_second_per_gpu"] for line in lines]),
        np.array([max(line["peak_memory_allocated_bytes"]) for line in lines], float),
    )


def pack(raw: Path, out: Path) -> None:
    """One line a config, and the self-benchmark in the first one."""
    header, *runs = (json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines())
    ranks = sorted({run["config"]["gpus"] for run in runs})
    precisions = sorted({run["config"]["precision"] for run in runs})
    assert len(ranks) == 1
    header["self_benchmark"] = measure(ranks[0], tuple(precisions)).to_dict()
    by_config: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_config.setdefault(json.dumps(run["config"], sort_keys=True), []).append(run)
    names = ("step_time_seconds", "tokens_per_second_per_gpu", "peak_memory_allocated_bytes", "elapsed_seconds")
    out.parent.mkdir(exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        print(json.dumps(header), file=file)
        for config, several in sorted(by_config.items()):
            line: dict[str, Any] = {"config": json.loads(config)}
            for name in names:
                line[name] = [round(run[name], 6) for run in sorted(several, key=lambda run: run["repeat"])]
            print(json.dumps(line), file=file)


@dataclass(frozen=True)
class CpuScenario:
    """The grid under the demo's limit, with what is predicted of it."""

    name: str
    grid: CpuGrid
    plan: Plan

    @cached_property
    def rows(self) -> Sequence[Row]:
        """Axis values of each config."""
        space = self.grid.space
        return [{axis: str(value) for axis, value in space.values(config).items()} for config in self.grid.configs]

    @cached_property
    def axes(self) -> list[str]:
        """Those with a choice."""
        return [axis for axis in self.grid.space.axes if len({row[axis] for row in self.rows}) > 1]

    @cached_property
    def throughput(self) -> Values:
        """(N,) medians, 0 of what leaves too little headroom."""
        medians = np.median(self.grid.tokens_per_second_per_gpu, axis=1)
        return np.where(self.grid.peak_bytes <= self.grid.space.usable_bytes, medians, 0.0)

    @cached_property
    def startable(self) -> NDArray[np.int64]:
        """Configs that are not surely too big."""
        return np.array([self._number[self.plan.space.candidates[int(at)]] for at in self._left], np.int64)

    @cached_property
    def candidates(self) -> Candidates:
        """These with their predictions."""
        return candidates_of(self.plan, self._left)

    @cached_property
    def _left(self) -> NDArray[np.int64]:
        return np.flatnonzero(~self.plan.surely_too_big)

    @cached_property
    def _number(self) -> dict[TrialConfig, int]:
        return {config: index for index, config in enumerate(self.grid.configs)}

    def is_oom(self, index: int) -> bool:
        """Whether the peak is beyond the limit."""
        return bool(self.grid.peak_bytes[index] > self.grid.space.cluster.memory_bytes)

    def seen(self, index: int, seed: int) -> float:
        """One of the runs."""
        if not self.throughput[index]:
            return 0.0
        runs = self.grid.tokens_per_second_per_gpu[index]
        return float(runs[np.random.default_rng([seed, index]).integers(len(runs))])

    def observed(self, candidate: int, index: int, seed: int) -> Observed:
        """What it teaches."""
        if self.is_oom(index):
            return Observed(candidate=candidate, ran_out=True)
        runs = self.grid.tokens_per_second_per_gpu[index]
        throughput = float(runs[np.random.default_rng([seed, index]).integers(len(runs))])
        if self.plan.times is None:  # in units of the first run, as `PlanSampler` scales what nothing predicts
            throughput /= float(np.median(self.grid.tokens_per_second_per_gpu))
        return Observed(candidate=candidate, throughput=throughput, peak_bytes=float(self.grid.peak_bytes[index]))


def plan_of(grid: CpuGrid) -> Plan:
    """The demo's plan with the times of the machine on which the grid was recorded."""
    return plan_memory(grid.space, rates=grid.rates)


def search_untimed(scenario: Any, seed: int, budget: int) -> Launches:
    """`plan` without predicted times."""
    return search_plan(replace(scenario, plan=replace(scenario.plan, times=None)), seed, budget)


MINE: dict[str, tuple[Search, bool]] = SAMPLERS | {"plan": (search_plan, True), "plan-untimed": (search_untimed, True)}


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", type=Path, default=GRID, metavar="FILE", help="a packed grid")
    parser.add_argument("--pack", type=Path, metavar="RAW", help="write the grid from a recording, and end")
    parser.add_argument("--samplers", default="plan,plan-untimed,tpe,tpe-told,random", help=f"of {', '.join(MINE)}")
    parser.add_argument("--seeds", type=int, default=10, help="each draws the runs that are seen")
    parser.add_argument("--budget", type=int, default=30, help="launches")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    if arguments.pack:
        pack(arguments.pack, arguments.grid)
        return
    samplers = arguments.samplers.split(",")
    unknown = sorted(set(samplers) - set(MINE))
    if unknown:
        parser.error(f"--samplers: found {', '.join(unknown)}; use some of {', '.join(MINE)}")
    grid = read_grid(arguments.grid)
    scenario = CpuScenario("tiny-cpu", grid, plan_of(grid))
    with threadpool_limits(limits=1, user_api="blas"):
        found = replay([scenario], samplers, arguments.seeds, arguments.budget, MINE, marks=(4, 8, 15, 30))
    report: dict[str, Any] = {
        "grid": arguments.grid.name,
        "scenarios": 1,
        "configs": len(grid.configs),
        "out_of_memory": sum(scenario.is_oom(index) for index in range(len(grid.configs))),
        "budget": arguments.budget,
        "seeds": arguments.seeds,
        "samplers": found,
    }
    if "plan" in found:
        report["gates"] = {gate: found["plan"][gate] <= limit for gate, limit in GATES.items()}
    show(report, GATES)
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
