"""What does it cost to launch a trial? One small trial, launched three ways, one after the other in one run, on CPU.

    python benchmarks/launch_overhead.py [--trials 3] [--json]

- `pool`: `TrialTrainable` under Ray Tune with `reuse_actors` and a warm `NodePool`, as a study launches it. The pool's
  warm-up, once per node and study, is reported apart.
- `ray_train`: a Tune function trainable that starts a Ray Train `TorchTrainer` per trial, the pattern that Ray
  documents, with a poll of 0.2 s instead of the default 2 s.
- `fresh_processes`: two new Python processes per trial with torchrun's environment variables, without Ray.

All build the same model with `build_engine` (qwen3-tiny, DDP, fp32, two ranks on gloo, one thread each), count memory
the same way and run the same steps on the same data. Trials run one at a time. Two figures per trial:

- first step: seconds from the start of the trial's function to the end of the first training step, which is the one
  warm-up step, on the slowest rank. `ray_train` and `fresh_processes` read the clock there. The pool's ranks report how
  long each phase took (`RankMeasurement.phase_seconds`), so its figure is the whole trial function less the `measure`
  phase: an upper bound, since it also holds the end of the processes. The sum of the ranks' phases `start`, `build` and
  `warmup`, a lower bound that leaves out the call to the pool, is reported as `pool_phases_seconds`.
- wall: seconds between the ends of two trials, from the start of the tuner for the first. It holds what Tune needs
  around the function: for `pool` an actor process for the first trial only, for `ray_train` one for each.

With --json the last line is one object: hardware, date, versions, the values of each trial, medians and ratios.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from autotune.search.authentication import authenticate
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model
from autotune.spec.outcome import Measurement, outcome_from_dict
from autotune.spec.request import TrialRequest
from autotune.spec.workload import MeasureSettings, Workload
from autotune.units import GIB

RANKS = 2
LIMIT_SECONDS = 300.0
"""A trial that takes longer is broken."""
RAY_TRAIN_POLL_SECONDS = "0.2"
"""By default 2: `fit` would return up to 4 s after the end."""
DRIVER_CPUS, WORKER_CPUS = 0.2, 0.9
"""What a Ray Train trial reserves: two cores suffice for the driver and its workers."""


@dataclass(slots=True)
class Launcher:
    """The figures of one way to launch, by trial."""

    first_step_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """Of both figures."""
        return {
            "first_step_seconds": statistics.median(self.first_step_seconds),
            "wall_seconds": statistics.median(self.wall_seconds),
        }


def trial_request() -> TrialRequest:
    """The trial, the same for all launchers."""
    return TrialRequest(
        trial_id="launch",
        model=load_model("qwen3-tiny", Path("/")),
        workload=Workload(global_batch_size=4),
        config=TrialConfig(
            engine="pytorch", gpus=RANKS, micro_batch_size=2, sequence_length=64, precision="fp32", zero_stage=0
        ),
        device="cpu",
        measure=MeasureSettings(warmup=1, micro_steps=4),
        timeout_seconds=LIMIT_SECONDS,
        stall_seconds=LIMIT_SECONDS,
    )


def cluster() -> ClusterSpec:
    """The cluster that the trial fills."""
    return ClusterSpec(nodes=1, gpus_per_node=RANKS, gpu=find_gpu("cpu"), memory_bytes=4 * GIB)


def run_steps(request: TrialRequest) -> float:
    """What `autotune.trial.worker.run_rank` does, in a process group that is there already.

    Returns:
        `time.monotonic()` at the end of the warm-up on the slowest rank; all processes of a machine share that clock.
    """
    import torch
    import torch.distributed as dist

    from autotune.engines.batches import MicroBatch, inputs
    from autotune.engines.engine import build_engine
    from autotune.spec.outcome import Phase
    from autotune.trial.device_memory import device_memory
    from autotune.trial.measure import measure_plan, run_micro_steps, warmup_plan

    device = torch.device("cpu")
    accumulation = request.workload.gradient_accumulation_steps(request.config)

    def batch(step: int, micro_step: int) -> MicroBatch:
        return inputs(
            request.config,
            request.workload,
            request.model.vocab_size,
            step=step,
            micro_step=micro_step,
            rank=dist.get_rank(),
        )

    with device_memory(device, request.memory_limit_bytes) as memory:
        memory.enter_phase(Phase.BUILD)
        engine = build_engine(request, device)

        def run(plan: tuple[bool, ...], first_step: int) -> None:
            run_micro_steps(
                engine,
                plan,
                batch=batch,
                first_step=first_step,
                synchronize=lambda: None,
                barrier=dist.barrier,
                on_phase=memory.enter_phase,
                after_sample=memory.sample,
            )

        memory.begin()
        run(warmup_plan(accumulation, request.measure.warmup), 0)
        warm = time.monotonic()
        run(measure_plan(accumulation, request.measure.micro_steps), request.measure.warmup)
    slowest = torch.tensor(warm, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def pool(trials: int, folder: Path, launcher: Launcher, phases: list[float]) -> float:
    """Launch with a `NodePool`, into `launcher`. Ray is connected.

    Args:
        trials: how many.
        folder: for logs and Tune's files.
        launcher: gets the figures.
        phases: gets each trial's sum of `start`, `build` and `warmup` on the slowest rank.

    Returns:
        Seconds of the pool's warm-up.
    """
    import ray
    from ray import tune

    from autotune.trial.trainable import TrialTrainable, node_pool, placement

    request, spec, logs = trial_request(), cluster(), str(folder / "logs")
    started = time.monotonic()
    # The pool ends with its last handle.
    handle = node_pool(ray.get_runtime_context().get_node_id(), request.device, logs)
    ray.get(handle.ready.remote())
    warm_up_seconds = time.monotonic() - started
    trainable = tune.with_parameters(TrialTrainable, template=request, cluster=spec, log_dir=logs)
    space = {"config": request.config.to_dict(), "attempt": 1}
    trainable = tune.with_resources(trainable, placement(request.config, spec))
    for result in _tune(trainable, space, trials, folder / "pool", launcher, reuse_actors=True):
        outcome = outcome_from_dict(json.loads(result["outcome"]))
        if not isinstance(outcome, Measurement):
            raise RuntimeError(f"a trial of the pool failed: {outcome.message}")
        seconds = [rank.phase_seconds for rank in outcome.ranks]
        launcher.first_step_seconds.append(max(outcome.elapsed_seconds - rank["measure"] for rank in seconds))
        phases.append(max(rank["start"] + rank["build"] + rank["warmup"] for rank in seconds))
    del handle
    return warm_up_seconds


def ray_train(trials: int, folder: Path, launcher: Launcher) -> None:
    """Launch with Ray Train inside Tune, into `launcher`. Ray is connected."""
    from ray import tune

    storage, request = str(folder / "train"), trial_request()

    def train(config: dict[str, Any]) -> float:
        return run_steps(config["request"])

    def trial(config: dict[str, Any]) -> None:
        started = time.monotonic()
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            train,
            train_loop_config={"request": request},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=RANKS, resources_per_worker={"CPU": WORKER_CPUS}),
            run_config=ray.train.RunConfig(
                name=f"launch-{config['trial']}",
                storage_path=storage,
                # A negative limit, the default, would try a controller that cannot start for ever.
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        warm = trainer.fit().return_value
        tune.report({"first_step_seconds": warm - started})

    trainable = tune.with_resources(trial, {"CPU": DRIVER_CPUS})
    for result in _tune(trainable, {}, trials, folder / "ray_train", launcher, reuse_actors=False):
        launcher.first_step_seconds.append(result["first_step_seconds"])


def _tune(
    trainable: Any, space: dict[str, Any], trials: int, storage: Path, launcher: Launcher, *, reuse_actors: bool
) -> list[dict[str, Any]]:
    """Run a trainable some times, one trial at a time; the trials' results."""
    from ray import tune

    ends = [0.0]

    class Ends(tune.Callback):  # type: ignore[misc] # Ray ships no types
        def on_trial_complete(self, *_: object, **__: object) -> None:
            ends.append(time.monotonic())

    tuner = tune.Tuner(
        trainable,
        param_space={**space, "trial": tune.grid_search(list(range(1, trials + 1)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=reuse_actors),
        run_config=tune.RunConfig(name=storage.name, storage_path=str(storage), verbose=0, callbacks=[Ends()]),
    )
    ends[0] = time.monotonic()
    results = tuner.fit()
    for error in results.errors:
        raise RuntimeError(f"a trial of {storage.name} failed") from error
    launcher.wall_seconds.extend(end - begin for begin, end in itertools.pairwise(ends))
    return [result.metrics for result in results]


def fresh_processes(trials: int, folder: Path, launcher: Launcher) -> None:
    """Launch with new Python processes, into `launcher`."""
    from autotune.trial.pool import trial_environment

    for _ in range(trials):
        started = time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        gang = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
        }
        variables = {**os.environ, **trial_environment("cpu", str(folder)), **gang}
        command = [sys.executable, str(Path(__file__).resolve()), "--rank"]
        ranks: list[subprocess.Popen[str]] = []
        try:
            for rank in range(RANKS):
                seat = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(
                    subprocess.Popen(
                        command, env={**variables, **seat}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                    )
                )
            outputs = [rank.communicate(timeout=LIMIT_SECONDS)[0] for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"a fresh process failed with exit codes {[rank.returncode for rank in ranks]}")
        launcher.wall_seconds.append(time.monotonic() - started)
        launcher.first_step_seconds.append(float(outputs[0].split()[-1]) - started)


def _fresh_rank() -> int:
    """One process of `fresh_processes`; prints what `run_steps` returns."""
    import torch.distributed as dist

    dist.init_process_group(backend="gloo")
    print(run_steps(trial_request()))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def measure(trials: int) -> dict[str, Any]:
    """Run everything; nothing is left of it afterwards."""
    launchers = {name: Launcher() for name in ("pool", "ray_train", "fresh_processes")}
    phases: list[float] = []
    with tempfile.TemporaryDirectory(prefix="launch-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch).resolve()
        # Read when Ray is imported or started, and inherited by its processes.
        os.environ["RAY_TMPDIR"] = os.environ["TMPDIR"] = str(folder)
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = RAY_TRAIN_POLL_SECONDS
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # ranks meet on loopback in all three
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        authenticate(None)
        from autotune.search.cluster import connected

        steps: tuple[Callable[[], None], ...] = (
            lambda: ray_train(trials, folder, launchers["ray_train"]),
            lambda: fresh_processes(trials, folder, launchers["fresh_processes"]),
        )
        with connected(None, cluster()):
            warm_up_seconds = pool(trials, folder, launchers["pool"], phases)
            for step in steps:
                step()
    return report(launchers, phases, warm_up_seconds)


def report(launchers: dict[str, Launcher], phases: list[float], warm_up_seconds: float) -> dict[str, Any]:
    """Everything, as plain data."""
    from autotune.trial.environment import environment

    versions = environment("cpu")
    medians = {name: launcher.medians() for name, launcher in launchers.items()}
    return {
        "benchmark": "launch_overhead",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": versions.pop("device"),
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": versions,
        "ranks": RANKS,
        "pool_warm_up_seconds": warm_up_seconds,
        "pool_phases_seconds": phases,
        "trials": {name: dataclasses.asdict(launcher) for name, launcher in launchers.items()},
        "medians": medians,
        "ratios": {
            f"{name}/pool": {key: medians[name][key] / medians["pool"][key] for key in medians[name]}
            for name in ("ray_train", "fresh_processes")
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console  # not above: a fresh process would pay for it
    from rich.table import Table

    hardware = result["hardware"]
    table = Table(
        title=f"Seconds to launch a trial of {RANKS} ranks: medians",
        caption=f"{hardware['cpu']}, {hardware['cores']} cores; the pool's warm-up, once,"
        f" took {result['pool_warm_up_seconds']:.1f} s",
    )
    table.add_column("launcher")
    for heading in ("first step", "wall", "first step / pool", "wall / pool", "wall of each trial"):
        table.add_column(heading, justify="right")
    for name, medians in result["medians"].items():
        ratios = result["ratios"].get(f"{name}/pool", dict.fromkeys(medians, 1.0))
        table.add_row(
            name,
            *(f"{value:.2f}" for value in medians.values()),
            *(f"{value:.1f}x" for value in ratios.values()),
            ", ".join(f"{seconds:.2f}" for seconds in result["trials"][name]["wall_seconds"]),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> int:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trials", type=int, default=3, help="trials per launcher")
    arguments.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)  # be a fresh process
    options = arguments.parse_args()
    if options.rank:
        return _fresh_rank()
    if options.trials < 1:
        arguments.error(f"found --trials {options.trials}, but it must be at least 1")
    result = measure(options.trials)
    show(result)
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
