"""Are predicted step times the measured ones? On the recorded grid of the CPU demo, without and with a few trials.

    python benchmarks/time_cpu.py [--grid FILE] [--json]

The grid's first line has the self-benchmark of the machine on which it was recorded. From it and from operators that
are counted on fake tensors, every candidate's throughput is predicted, and compared with the median of its three runs:

- *uncalibrated*: Spearman's rank correlation over all candidates, the median error, and how often the 80 % interval of
  the prior holds the measurement.
- *after eight trials*: eight candidates are drawn at random and one run of each is told to the posterior that `tune`
  uses (`autotune.search.expected_improvement`); the other candidates are scored. Median over twenty fixed draws, and
  the worst of them. No constant is chosen by these figures.
- *after the sampler's eight*: the same with the eight that the sampler launches under the demo's memory limit.
- *memory*: the 80 % interval of the predicted peak.

The ablation takes one part out of every predicted step.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cpu_grid import GRID, CpuGrid, CpuScenario, plan_of, read_grid
from foreign_time import spearman
from numpy.typing import NDArray
from replay import search_plan
from threadpoolctl import threadpool_limits

from autotune.predict.plan import Plan
from autotune.search.candidates import Observed
from autotune.search.columns import candidates_of
from autotune.search.expected_improvement import Expectation, ExpectedImprovement

Values = NDArray[np.float64]
Indices = NDArray[np.int64]

TRIALS = 8
DRAWS = 20
UNCALIBRATED_GATE, CALIBRATED_GATE = 0.8, 0.9
COVERAGE_GATE = (0.7, 0.9)


def judge(expected: Expectation, measured: Values, scored: Indices) -> dict[str, float]:
    """How well some candidates were foretold."""
    errors = np.abs(expected.throughput / measured - 1)[scored]
    low, high = expected.throughput_between(0.8)
    inside = (low <= measured) & (measured <= high)
    return {
        "spearman": round(spearman(expected.throughput[scored], measured[scored]), 4),
        "median_error": round(float(np.median(errors)), 4),
        "coverage_of_80%": round(float(inside[scored].mean()), 4),
        "width_of_80%": round(float(np.median((high / low)[scored])), 3),
    }


def time_cpu(grid: CpuGrid, plan: Plan) -> dict[str, Any]:
    """The report."""
    assert plan.times is not None
    number = {config: index for index, config in enumerate(grid.configs)}
    of = np.array([number[config] for config in map(plan.space.candidates.__getitem__, range(len(grid.configs)))])
    runs, peaks = grid.tokens_per_second_per_gpu[of], grid.peak_bytes[of]
    measured, every = np.median(runs, axis=1), np.arange(len(of))
    search = ExpectedImprovement(candidates_of(plan, every))

    def told(chosen: Indices, chance: np.random.Generator) -> list[Observed]:
        shown = chance.integers(runs.shape[1], size=len(chosen))
        return [
            Observed(candidate=int(at), throughput=float(runs[at, run]), peak_bytes=float(peaks[at]))
            for at, run in zip(chosen, shown, strict=True)
        ]

    def after(chosen: Indices, chance: np.random.Generator) -> dict[str, float]:
        return judge(search.expect(told(chosen, chance)), measured, np.setdiff1d(every, chosen))

    prior = search.expect([])
    drawn = []
    for draw in range(DRAWS):
        chance = np.random.default_rng(draw)
        drawn.append(after(chance.choice(every, TRIALS, replace=False), chance))
    scenario = CpuScenario("tiny-cpu", grid, plan)
    place = np.argsort(of)
    launched = np.array([place[index] for index in search_plan(scenario, 0, TRIALS)])

    low, high = prior.peak_between(0.8)
    times = plan.times
    whole = spearman(times.tokens_per_second_per_gpu, measured)
    return {
        "grid": {"date": grid.header["date"], "hardware": grid.header["hardware"], "configs": len(of)},
        "repeats_differ_by": round(float(np.std(np.log(runs / measured[:, None]))), 4),
        "uncalibrated": judge(prior, measured, every),
        "after_8_trials": _quantiles(drawn),
        "after_the_samplers_8": after(launched, np.random.default_rng(0)),
        "memory": {
            "median_error": round(float(np.median(np.abs(prior.peak_bytes / peaks - 1))), 5),
            "largest_error": round(float(np.max(np.abs(prior.peak_bytes / peaks - 1))), 4),
            "coverage_of_80%": round(float(((low <= peaks) & (peaks <= high)).mean()), 4),
        },
        "contribution_to_spearman": {
            part.value: {
                "share_of_step": round(float(np.mean(seconds / times.step_seconds)), 3),
                "contributes": round(
                    whole - spearman(times.tokens_per_gpu / (times.step_seconds - seconds), measured), 4
                ),
            }
            for part, seconds in times.parts.items()
        },
    }


def _quantiles(drawn: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each figure over the draws."""
    columns = {name: sorted(one[name] for one in drawn) for name in drawn[0]}
    return {
        name: {"median": round(float(np.median(column)), 4), "least": column[0], "most": column[-1]}
        for name, column in columns.items()
    }


def gates(report: dict[str, Any]) -> dict[str, bool]:
    """Which lines of the issue hold."""
    later = report["after_8_trials"]
    low, high = COVERAGE_GATE
    return {
        "rank correlation uncalibrated": report["uncalibrated"]["spearman"] >= UNCALIBRATED_GATE,
        "rank correlation after eight trials": later["spearman"]["median"] >= CALIBRATED_GATE,
        "coverage after eight trials": low <= later["coverage_of_80%"]["median"] <= high,
    }


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", type=Path, default=GRID, metavar="FILE", help="a packed grid")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    grid = read_grid(arguments.grid)
    plan = plan_of(grid)
    with threadpool_limits(limits=1, user_api="blas"):
        report = time_cpu(grid, plan)
    report["gates"] = gates(report)
    for name, value in report.items():
        if isinstance(value, dict):
            print(name)
            for key, figure in value.items():
                print(f"  {key:<36} {figure}")
        else:
            print(f"{name}  {value}")
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
