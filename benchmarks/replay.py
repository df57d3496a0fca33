"""How many launches does a sampler need? Replays measured grids: whatever it proposes was run once, by someone else.

    python benchmarks/replay.py --grid FILE.csv [--samplers plan,tpe,gp,random] [--seeds N] [--budget 30] [--json]
    python benchmarks/replay.py --grid FILE.csv --after 8 [--then 64] [--launches 15] [--budget 30] [--json]

FILE has the columns of `nanotron_bench_final2.csv`; `scenarios.py` says what a scenario is.

Every launch costs the same, failures too. Regret after n launches is 1 - best measured / best of the scenario, and 1
while nothing was measured. Launches to 5 % are those after which regret is at most 0.05; quantiles are over scenarios
and seeds, and a run that never gets there within the budget counts as longer than any.

- `plan`: `autotune.search.expected_improvement` over the predictions of `autotune.predict` (profile nanotron-checked),
  the same constants for every scenario; no seed. Like a study, it is not offered what the trainer refuses to start:
  sizes that do not divide, and fewer micro-batches than stages less one (huggingface/nanotron,
  parallel/pipeline_parallel/engine.py).
- `tpe`, `gp`: Optuna's, as `autotune tune --sampler` builds them: memory as a constraint, failures as infeasible with
  the worst value, proposals outside the grid or already launched redrawn and, after some redraws, replaced at random.
  They know no predictions; `tpe-told` is offered the same candidates as `plan`, less what is predicted not to fit.
- `random`: uniform without replacement.

With `--after 8` each scenario of more GPUs (or of `--then` GPUs alone) of which there is one of eight GPUs is searched
by `plan` as it is, and by `plan-after-8`, which first has what `--launches` launches of `plan` there have taught; and
how far off the throughputs are that are expected of all configs before the first launch, with and without that.
"""

import argparse
import csv
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from scenarios import SMALLEST_SCENARIO, Scenario, Sweep, Values, read_scenarios
from threadpoolctl import threadpool_limits

from autotune.predict.roofline import TimePart
from autotune.search.candidates import Candidates, Observed
from autotune.search.expected_improvement import ExpectedImprovement
from autotune.search.samplers import SamplerName, build_sampler
from autotune.search.step_parts import network_parts

MARKS = (5, 10, 15, 30)
TOLERANCES = (0.05, 0.02)
FAILURES_WITHIN = 15
REDRAWS = {"tpe": 100, "tpe-told": 100, "gp": 5}
"""Proposals of Optuna's that are redrawn before one is taken at random. Its Gaussian process takes seconds for what TPE
does in milliseconds, and tends to propose the same again."""
GATES = {
    "regret_after_5": 0.06,
    "regret_after_10": 0.02,
    "regret_after_15": 0.01,
    "median_launches_to_5%": 3,
    "p90_launches_to_5%": 9,
    "oom_share": 0.05,
    "failed_share": 0.12,
}
Launches = list[int]
Search = Callable[[Scenario, int, int], Launches]
"""Scenario, seed and budget to the configs launched, in order."""


def search_plan(
    scenario: Scenario,
    seed: int,
    budget: int,
    candidates: Candidates | None = None,
    lessons: Sequence[Observed] = (),
) -> Launches:
    """Expected improvement over the predictions; over `candidates` with earlier `lessons`, where there are any."""
    search = ExpectedImprovement(scenario.candidates if candidates is None else candidates)
    observed, launched = list(lessons), list[int]()
    for _ in range(budget):
        proposal = search.propose(observed)
        if proposal is None:
            break
        index = int(scenario.startable[proposal.candidate])
        launched.append(index)
        observed.append(scenario.observed(proposal.candidate, index, seed))
    return launched


def taught(before: Sweep, scenario: Sweep, launches: int) -> tuple[Candidates, list[Observed]]:
    """The candidates of a scenario with what so many launches of `plan` on fewer GPUs have run and taught."""
    ran = search_plan(before, 0, launches)
    places = [int(np.searchsorted(before.startable, index)) for index in ran]
    given, known = scenario.candidates, before.candidates.only(np.array(places, np.int64))
    lessons = [
        replace(before.observed(place, index, 0), candidate=len(given.throughput) + row)
        for row, (place, index) in enumerate(zip(places, ran, strict=True))
    ]
    # Eight GPUs share a node: its links say nothing of the network between nodes.
    elsewhere = np.full(len(ran), before.gpus <= 8 < scenario.gpus)
    return given.before(known, network_parts(list(TimePart)), elsewhere), lessons


def search_after(earlier: dict[str, Sweep], launches: int) -> Search:
    """Expected improvement that begins with what was `taught`.

    Args:
        earlier: by the name of a scenario, the one that came before it.
        launches: there, by the same sampler.
    """

    def search(scenario: Scenario, seed: int, budget: int) -> Launches:
        assert isinstance(scenario, Sweep)
        return search_plan(scenario, seed, budget, *taught(earlier[scenario.name], scenario, launches))

    return search


def first_errors(scenarios: Sequence[Sweep], earlier: dict[str, Sweep], launches: int) -> dict[str, list[float]]:
    """Median error of the throughput that is expected of all configs before any of them is launched, of those that ran:
    as predicted, and after what was `taught`. By the name of the scenario.
    """
    found = {}
    for scenario in scenarios:
        measured = scenario.throughput[scenario.startable]
        rows = np.flatnonzero(measured)
        errors = []
        for candidates, lessons in (
            (scenario.candidates, list[Observed]()),
            taught(earlier[scenario.name], scenario, launches),
        ):
            expected = ExpectedImprovement(candidates).expect(lessons, rows).throughput
            errors.append(round(float(np.median(np.abs(expected / measured[rows] - 1))), 4))
        found[scenario.name] = errors
    return found


def search_random(scenario: Scenario, seed: int, budget: int) -> Launches:
    """Uniform without replacement."""
    order = np.random.default_rng(seed).permutation(len(scenario.rows))
    return [int(index) for index in order[:budget]]


def search_optuna(name: str) -> Search:
    """Optuna's sampler of that name, as `TuneSearch` feeds it."""

    def search(scenario: Scenario, seed: int, budget: int) -> Launches:
        told = name.endswith("-told")
        offered = list(range(len(scenario.rows)))
        if told:
            fitting = scenario.candidates.peak_bytes <= scenario.candidates.capacity_bytes
            offered = [int(index) for index in scenario.startable[fitting]]
        sampler = build_sampler(SamplerName(name.removesuffix("-told")), seed)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        chance, launched = np.random.default_rng(seed), list[int]()
        axes = scenario.axes
        by_values = {tuple(scenario.rows[index][axis] for axis in axes): index for index in offered}
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            axis: optuna.distributions.CategoricalDistribution(sorted({values[i] for values in by_values}))
            for i, axis in enumerate(axes)
        }
        worst = 0.0
        for _ in range(min(budget, len(by_values))):
            trial, index = None, None
            for _ in range(REDRAWS[name]):
                trial = study.ask(distributions)
                index = by_values.get(tuple(trial.params[axis] for axis in axes))
                if index is not None and index not in launched:
                    break
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                trial = index = None
            if trial is None or index is None:
                index = int(chance.choice([i for i in offered if i not in launched]))
                study.enqueue_trial({axis: scenario.rows[index][axis] for axis in axes})
                trial = study.ask(distributions)
            launched.append(index)
            measured = scenario.seen(index, seed)
            ran = [value for i in launched if (value := scenario.seen(i, seed))]
            worst = min(ran, default=0.0)
            violation = 1.0 if scenario.is_oom(index) else 0.5
            trial.set_constraint("memory", 0.0 if measured else violation)
            study.tell(trial, measured or worst)
        return launched

    return search


SAMPLERS: dict[str, tuple[Search, bool]] = {
    "plan": (search_plan, False),
    "tpe": (search_optuna("tpe"), True),
    "tpe-told": (search_optuna("tpe-told"), True),
    "gp": (search_optuna("gp"), True),
    "random": (search_random, True),
}
"""And whether a seed makes a difference."""


def regrets(scenario: Scenario, launched: Launches, budget: int) -> Values:
    """After 1 .. budget launches; who stopped early keeps what was found."""
    measured = np.zeros(budget)
    measured[: len(launched)] = scenario.throughput[launched]
    return np.asarray(1 - np.maximum.accumulate(measured) / scenario.throughput.max())


def replay(
    scenarios: Sequence[Scenario],
    samplers: Sequence[str],
    seeds: int,
    budget: int,
    known: dict[str, tuple[Search, bool]] = SAMPLERS,
    marks: Sequence[int] = MARKS,
) -> dict[str, Any]:
    """Every sampler, of those that are known, on every scenario; regret after so many launches."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    report: dict[str, Any] = {}
    for name in samplers:
        search, seeded = known[name]
        began = time.perf_counter()
        runs = [
            (scenario, search(scenario, seed, budget))
            for scenario in scenarios
            for seed in range(seeds if seeded else 1)
        ]
        report[name] = {**_summary(runs, budget, marks), "seconds": round(time.perf_counter() - began, 1)}
    return report


def _summary(runs: Sequence[tuple[Scenario, Launches]], budget: int, marks: Sequence[int] = MARKS) -> dict[str, Any]:
    curves = np.array([regrets(scenario, launched, budget) for scenario, launched in runs])
    found: dict[str, Any] = {
        f"regret_after_{mark}": round(float(curves[:, mark - 1].mean()), 4) for mark in marks if mark <= budget
    }
    for tolerance in TOLERANCES:
        reached = curves <= tolerance
        needed = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, budget + 1)
        for label, share in (("median", 0.5), ("p90", 0.9)):
            launches = float(np.quantile(needed, share, method="higher"))
            found[f"{label}_launches_to_{tolerance:.0%}"] = launches if launches <= budget else None
        found[f"reached_{tolerance:.0%}"] = round(float(reached.any(axis=1).mean()), 4)
    first = [(scenario, launched[:FAILURES_WITHIN]) for scenario, launched in runs]
    total = sum(len(launched) for _, launched in first)
    ooms = sum(scenario.is_oom(index) for scenario, launched in first for index in launched)
    failed = sum(not scenario.throughput[index] for scenario, launched in first for index in launched)
    found["oom_share"], found["failed_share"] = round(ooms / max(total, 1), 4), round(failed / max(total, 1), 4)
    by_scenario: dict[str, list[Values]] = defaultdict(list)
    for (scenario, _), curve in zip(runs, curves, strict=True):
        by_scenario[scenario.name].append(curve)
    found["scenarios"] = {
        name: {
            str(mark): round(float(np.mean([curve[mark - 1] for curve in several])), 4)
            for mark in marks
            if mark <= budget
        }
        for name, several in by_scenario.items()
    }
    return found


def judge(found: dict[str, Any]) -> dict[str, bool]:
    """Which gates a sampler passes; a number of launches that the budget does not reach is too many."""
    return {gate: found[gate] is not None and found[gate] <= limit for gate, limit in GATES.items() if gate in found}


def show(report: dict[str, Any], gates: dict[str, float] = GATES) -> None:
    """Plain lines."""
    for name, found in report["samplers"].items():
        print(f"\n{name}")
        for key, value in found.items():
            if key != "scenarios":
                limit = f"  (gate {gates[key]})" if key in gates else ""
                print(f"  {key:<28} {'beyond the budget' if value is None else value}{limit}")
        for scenario, marks in found["scenarios"].items():
            print(f"    {scenario:<32} " + "  ".join(f"{mark}: {value:.4f}" for mark, value in marks.items()))
    print(f"\n{report['scenarios']} scenarios, {report['configs']} configs; gates of plan: {report.get('gates')}")


def _before(scenarios: Sequence[Sweep], gpus: int, then: int | None) -> dict[str, Sweep]:
    """By the name of each scenario on more GPUs, the one of the same model on `gpus`."""
    models = {scenario.name: scenario.name.rsplit(" ", 1)[0] for scenario in scenarios}
    first = {models[one.name]: one for one in scenarios if one.gpus == gpus}
    return {
        one.name: first[models[one.name]]
        for one in scenarios
        if models[one.name] in first and one.gpus > gpus and then in (None, one.gpus)
    }


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", type=Path, required=True, metavar="FILE", help="CSV of measured configs")
    parser.add_argument("--samplers", default="plan,tpe,gp,random", help=f"of {', '.join(SAMPLERS)}")
    parser.add_argument("--seeds", type=int, default=3, help="of samplers that draw")
    parser.add_argument("--budget", type=int, default=30, help="launches")
    parser.add_argument("--after", type=int, metavar="GPUS", help="begin with what was learnt on so many")
    parser.add_argument("--then", type=int, metavar="GPUS", help="with --after: search scenarios of so many alone")
    parser.add_argument("--launches", type=int, default=15, help="with --after: on those")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    samplers = arguments.samplers.split(",")
    unknown = sorted(set(samplers) - set(SAMPLERS))
    if unknown:
        parser.error(f"--samplers: found {', '.join(unknown)}; use some of {', '.join(SAMPLERS)}")
    if arguments.seeds < 1 or arguments.budget < 1:
        parser.error("--seeds and --budget are at least 1")
    with arguments.grid.open(newline="", encoding="utf-8") as file:
        scenarios = read_scenarios(csv.DictReader(file))
    if not scenarios:
        parser.error(f"{arguments.grid}: has no scenario with {SMALLEST_SCENARIO} configs of which ten ran")
    known, earlier = SAMPLERS, dict[str, Sweep]()
    if arguments.after is not None:
        earlier = _before(scenarios, arguments.after, arguments.then)
        if not earlier:
            parser.error(
                f"--after {arguments.after}: {arguments.grid} has no scenario of that many GPUs with a larger one"
            )
        scenarios = [scenario for scenario in scenarios if scenario.name in earlier]
        after = f"plan-after-{arguments.after}"
        known, samplers = SAMPLERS | {after: (search_after(earlier, arguments.launches), False)}, ["plan", after]
    with threadpool_limits(limits=1, user_api="blas"):  # as `autotune.search.plan_sampler` holds it
        found = replay(scenarios, samplers, arguments.seeds, arguments.budget, known)
    report: dict[str, Any] = {
        "grid": arguments.grid.name,
        "scenarios": len(scenarios),
        "configs": sum(len(scenario.rows) for scenario in scenarios),
        "budget": arguments.budget,
        "seeds": arguments.seeds,
        "samplers": found,
    }
    if "plan" in report["samplers"]:
        report["gates"] = judge(report["samplers"]["plan"])
    show(report)
    if arguments.after is not None:
        report["first_errors"] = first_errors(scenarios, earlier, arguments.launches)
        print("median error of expected throughputs before the first launch, as predicted and as taught")
        for name, (alone, after_it) in report["first_errors"].items():
            print(f"  {name:<32} {alone:.1%}  {after_it:.1%}")
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
