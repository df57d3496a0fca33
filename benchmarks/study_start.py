"""How long until the next candidate is known: of a study with 10,000 stored trials, and of a long search?

    python benchmarks/study_start.py [--trials 10000] [--json]

Start: a space of Qwen3-8B on eight H100 is planned once, so that its structures are traced; then its store is filled
with that many finished trials of eight ranks, one in ten or more out of memory. A new process then does all that
`autotune tune` does up to its first proposal, the start of Ray left out, which depends on no trial: import, read the
space, plan, open the store and the study, build the sampler, propose. Timed from the start of the process, with the
processor's seconds beside, which a busy machine stretches less; the same on a store without trials tells what the
trials cost. Gate: at most 5 seconds.

Next candidate: 10,000 candidates of that space, and the 234,024 of `plan_warm.py`'s, each with 500 finished trials
whose throughput is what is predicted times chance; the median of five proposals. Gates: 0.1 and 1 second.
"""

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from plan_warm import SPACE as LARGE_SPACE
from threadpoolctl import threadpool_limits

from autotune.predict.plan import Plan, plan_memory
from autotune.search.candidates import Observed
from autotune.search.columns import candidates_of
from autotune.search.expected_improvement import ExpectedImprovement
from autotune.space.space import load_space
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome, Phase, RankMeasurement
from autotune.store.store import open_store
from autotune.study import Study

MOST_START_SECONDS = 5.0
FINISHED = 500
MOST_SECONDS = {10_000: 0.1, 234_024: 1.0}
RANKS = 8
SPACE = """
study: study-start
model: Qwen/Qwen3-8B
cluster: {nodes: 1, gpus_per_node: 8, gpu: H100-80GB}
workload: {global_batch_size: 512, sequence_length: 1024}
search:
  engine: [deepspeed, pytorch]
  zero_stage: [1, 2, 3]
  activation_checkpointing: [none, full]
  micro_batch_size: [1, 2, 4, 8, 16, 32]
  deepspeed:
    zero_optimization.overlap_comm: [true, false]
    zero_optimization.contiguous_gradients: [true, false]
    zero_optimization.reduce_bucket_size: [5.0e+7, 1.0e+8, 2.0e+8, 5.0e+8]
    zero_optimization.allgather_bucket_size: [5.0e+7, 1.0e+8, 2.0e+8, 5.0e+8]
    zero_optimization.stage3_prefetch_bucket_size: [1.0e+7, 5.0e+7, 1.0e+8, 5.0e+8]
    zero_optimization.stage3_max_live_parameters: [5.0e+8, 1.0e+9]
    zero_optimization.stage3_param_persistence_threshold: [1.0e+4, 1.0e+5, 1.0e+6]
budget: {trials: 100000, stop_below_gain: 0, trial_seconds: 900}
"""


def outcome_of(plan: Plan, at: int, chance: np.random.Generator) -> Outcome:
    """What a trial of candidate `at` might have found: as predicted, times chance; what does not fit runs out."""
    assert plan.times is not None
    used = int(plan.device_used_bytes[at] * chance.normal(1.0, 0.02))
    total = plan.space.cluster.memory_bytes
    if used > total or chance.random() < 0.1:
        return Failure(kind=FailureKind.OUT_OF_MEMORY, phase=Phase.BACKWARD, message="out of memory", rank=0)
    seconds = float(plan.times.step_seconds[at] * chance.lognormal(0.0, 0.1))
    rank = RankMeasurement(
        rank=0,
        micro_step_seconds=(seconds / 64,) * 6,
        update_step_seconds=(seconds / 50,) * 2,
        losses=(11.9,) * 9,
        peak_memory_allocated_bytes=used - 2**30,
        peak_memory_reserved_bytes=used,
        peak_device_used_bytes=used,
        device_memory_bytes=total,
        allocator_retries=0,
        phase_seconds={"start": 0.5, "build": 20.0, "warmup": 10.0, "measure": seconds},
        environment={"device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "deepspeed": "0.19.8"},
    )
    return Measurement(
        step_time_seconds=seconds,
        tokens_per_second_per_gpu=float(plan.times.tokens_per_gpu[at]) / seconds,
        model_flops_utilization=0.4,
        peak_memory_allocated_bytes=used - 2**30,
        peak_memory_reserved_bytes=used,
        peak_device_used_bytes=used,
        device_memory_bytes=total,
        allocator_retries=0,
        phase_seconds=rank.phase_seconds,
        ranks=tuple(replace(rank, rank=number) for number in range(RANKS)),
        elapsed_seconds=40.0,
    )


def fill(plan: Plan, url: str, trials: int) -> None:
    """A store with so many finished trials of the space, through its own interface."""
    chance = np.random.default_rng(0)
    space = plan.space
    with open_store(url, create=True) as store:
        Study.open(space, store, plan)
        for at in chance.choice(np.flatnonzero(~plan.surely_too_big), trials, replace=False).tolist():
            config = space.candidates[at]
            _, attempt = store.begin_attempt(space.name, config, "search", plan.of(config))
            store.finish_attempt(attempt, outcome_of(plan, at, chance))


def start(space_path: Path, url: str, began: float) -> dict[str, Any]:
    """What `tune` does up to the first proposal, and after each step the seconds since the process was asked for."""
    seconds: dict[str, float] = {}
    processor_seconds: dict[str, float] = {}

    def reached(step: str) -> None:
        seconds[step], processor_seconds[step] = time.time() - began, time.process_time()

    from autotune.cli.main import NEW_OBJECTS
    from autotune.search.samplers import SamplerName, build_sampler
    from autotune.search.tune_search import TuneSearch

    gc.set_threshold(NEW_OBJECTS)  # as `main` does
    reached("import")
    plan = plan_memory(load_space(space_path))
    reached("plan")
    with open_store(url, create=True) as store:
        study = Study.open(plan.space, store, plan)
        reached("open the study")
        search = TuneSearch(study, build_sampler(SamplerName.PLAN, 0, study, plan), 0)
        reached("build the sampler")
        found = search.suggest("first")
        reached("propose")
        assert isinstance(found, dict)
        return {
            "finished": study.counts.finished,
            "candidates": len(study.worth_a_launch),
            "seconds": seconds,
            "processor_seconds": processor_seconds,
        }


def next_candidate(plan: Plan, candidates: int, proposals: int = 5) -> float:
    """Median seconds until a candidate is proposed, with `FINISHED` trials."""
    chance = np.random.default_rng(0)
    left = np.sort(chance.choice(len(plan.device_used_bytes), candidates, replace=False))
    given = candidates_of(plan, left)
    search, took, observed = ExpectedImprovement(given), list[float](), list[Observed]()
    for at in chance.choice(candidates, FINISHED, replace=False).tolist():
        if given.peak_bytes[at] > given.capacity_bytes:
            observed.append(Observed(candidate=at, ran_out=True))
        else:
            speed = float(given.throughput[at] * chance.lognormal(0.0, 0.1))
            observed.append(Observed(candidate=at, throughput=speed, peak_bytes=float(given.peak_bytes[at])))
    with threadpool_limits(limits=1, user_api="blas"):  # as `autotune.search.plan_sampler` holds it
        for number in range(proposals):
            began = time.perf_counter()
            proposal = search.propose(observed)
            took.append(time.perf_counter() - began)
            assert proposal is not None
            at = proposal.candidate
            observed[number] = Observed(candidate=at, throughput=float(given.throughput[at]))
    return statistics.median(took)


def planned(folder: Path, text: str) -> Plan:
    """The plan of a space file, in this process."""
    folder.mkdir()
    path = folder / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return plan_memory(load_space(path))


def compare(scratch: Path, trials: int) -> dict[str, Any]:
    """All figures."""
    plan, large = planned(scratch / "small", SPACE), planned(scratch / "large", LARGE_SPACE)
    fill(plan, f"sqlite:///{scratch}/full.db", trials)
    starts = {}
    for name in ("empty", "full"):
        url, space = f"sqlite:///{scratch}/{name}.db", str(scratch / "small" / "space.yaml")
        command = [sys.executable, __file__, "--start", space, url, repr(time.time())]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        starts[name] = json.loads(run.stdout.splitlines()[-1])
    proposals = {count: next_candidate(plan if count == 10_000 else large, count) for count in MOST_SECONDS}
    seconds = starts["full"]["seconds"]["propose"]
    return {
        "benchmark": "study_start",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"cores": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total},
        "starts": starts,
        "start_seconds": seconds,
        "next_candidate_seconds": proposals,
        "passed": seconds <= MOST_START_SECONDS
        and all(took <= MOST_SECONDS[count] for count, took in proposals.items()),
    }


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000, help="stored trials")
    parser.add_argument(
        "--start", nargs=3, metavar=("SPACE", "STORE", "BEGAN"), help="go on with a start, and print its times"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(Path(options.start[0]), options.start[1], float(options.start[2]))))
        return 0
    with tempfile.TemporaryDirectory(prefix="start-") as scratch:
        report = compare(Path(scratch), options.trials)
    for one in report["starts"].values():
        print(f"{one['finished']} stored trials, {one['candidates']} candidates; seconds (of the processor) after")
        for step, seconds in one["seconds"].items():
            print(f"  {step:<18} {seconds:5.2f} ({one['processor_seconds'][step]:.2f})")
    print(f"start {report['start_seconds']:.2f} s (at most {MOST_START_SECONDS:g})")
    for count, seconds in report["next_candidate_seconds"].items():
        print(f"next of {count} candidates {seconds:.3f} s (at most {MOST_SECONDS[count]:g})")
    print("passed" if report["passed"] else "FAILED")
    if options.json:
        print(json.dumps(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
