"""`benchmarks/replay.py` on a grid that is made up."""

import csv
import importlib
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BATCH = 256


@pytest.fixture(scope="module")
def replay() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("replay")


def row(tp: int, pp: int, micro: int, zero: int, *, gpus: int = 16, **more: Any) -> dict[str, str]:
    dp = gpus // tp // pp
    fits = micro / tp / pp <= 2
    throughput = 20_000 * micro**0.3 / tp**0.4 / pp**0.2 * (1 - 0.05 * zero)
    values = {
        "model": "llama-1B",
        "hidden": 2048,
        "layers": 16,
        "heads": 32,
        "kv_heads": 32,
        "ffn": 8192,
        "vocab": 131072,
        "gpu": "H100-80GB",
        "n_gpus": gpus,
        "sharding": f"zero{zero}",
        "tp": tp,
        "pp": pp,
        "dp": dp,
        "seq_len": 4096,
        "micro_batch": micro,
        "grad_accum": BATCH // dp // micro,
        "global_batch": BATCH,
        "outcome": "ok" if fits else "oom",
        "peak_mem": 20.5 if fits else "",
        "tokens_per_s_per_gpu": throughput if fits else "",
        "job_id": 1,
        "run_name": f"{tp}-{pp}-{micro}-{zero}",
        "after_pp_fix": True,
        **more,
    }
    return {key: str(value) for key, value in values.items()}


def grid() -> list[dict[str, str]]:
    found = [row(*config) for config in product((1, 2, 4, 8), (1, 2), (1, 2, 4, 8), (0, 1))]
    assert len(found) == 64
    return found


def test_scenarios_are_grids_that_are_large_enough(replay: Any) -> None:
    few = [row(*config, gpus=8) for config in product((1, 2, 4), (1, 2), (1, 2, 4, 8), (0, 1))]
    other_batch = [row(1, 1, 1, 0, global_batch=512, tokens_per_s_per_gpu=1e9)]
    (scenario,) = replay.read_scenarios([*few, *grid(), *other_batch])
    assert len(scenario.rows) == 64
    assert scenario.throughput.max() < 1e6
    assert len(scenario.startable) == 64
    poor = [{**one, "outcome": "oom"} for one in grid()[:55]] + grid()[55:]
    assert replay.read_scenarios(poor) == []


def test_of_repeats_the_one_that_ran_counts_then_the_newest(replay: Any) -> None:
    ran, failed = row(1, 1, 1, 0, job_id=5), row(2, 1, 1, 0, job_id=5, outcome="other_fail")
    later = [row(1, 1, 1, 0, job_id=9, outcome="oom"), row(2, 1, 1, 0, job_id=9, outcome="oom")]
    earlier = [row(2, 1, 1, 0, job_id=2, outcome="other_fail")]
    for rows in ([*grid()[2:], ran, failed, *later, *earlier], [*later, *earlier, failed, ran, *grid()[2:]]):
        (scenario,) = replay.read_scenarios([one for one in rows if one not in (grid()[16], grid()[0])])
        chosen = {one["run_name"]: one for one in scenario.rows}
        assert chosen["1-1-1-0"]["outcome"] == "ok"
        assert chosen["2-1-1-0"]["outcome"] == "oom"


def test_a_rank_that_ran_out_later_is_out_of_memory_and_not_the_best(replay: Any) -> None:
    late = row(1, 1, 1, 0, outcome="ok_then_oom", tokens_per_s_per_gpu=1e9)
    (scenario,) = replay.read_scenarios([late, *grid()[1:]])
    index = next(at for at, one in enumerate(scenario.rows) if one["outcome"] == "ok_then_oom")
    assert scenario.is_oom(index)
    assert scenario.throughput[index] == 0
    assert scenario.observed(index, index, 0).ran_out


def test_regret_is_one_while_nothing_was_measured_and_never_rises(replay: Any) -> None:
    (scenario,) = replay.read_scenarios(grid())
    best, oom = int(scenario.throughput.argmax()), int(scenario.throughput.argmin())
    other = next(at for at in range(64) if 0 < scenario.throughput[at] < scenario.throughput[best])
    curve = replay.regrets(scenario, [oom, other, best], 5)
    np.testing.assert_allclose(curve, [1, 1 - scenario.throughput[other] / scenario.throughput[best], 0, 0, 0])
    found = replay._summary([(scenario, [oom, other, best]), (scenario, [oom])], 5)
    assert found["regret_after_5"] == 0.5
    assert found["median_launches_to_5%"] is None
    assert found["reached_5%"] == 0.5
    assert found["oom_share"] == found["failed_share"] == 0.5
    assert not replay.judge(found)["median_launches_to_5%"]


@pytest.mark.parametrize("name", ["plan", "tpe", "tpe-told", "random"])
def test_no_sampler_launches_a_config_twice(replay: Any, name: str) -> None:
    (scenario,) = replay.read_scenarios(grid())
    search, seeded = replay.SAMPLERS[name]
    launched = search(scenario, 0, 20)
    assert len(set(launched)) == len(launched) == 20
    assert search(scenario, 0, 20) == launched
    assert seeded == (search(scenario, 1, 20) != launched)


def test_what_the_trainer_refuses_is_not_offered_to_plan(replay: Any) -> None:
    deep = [row(1, 16, 8, zero, grad_accum=8, dp=1) for zero in (0, 1)]
    (scenario,) = replay.read_scenarios([*grid(), *deep])
    assert len(scenario.rows) == 66
    assert len(scenario.startable) == 64
    assert all(scenario.rows[at]["pp"] != "16" for at in replay.search_plan(scenario, 0, 64))


@pytest.mark.slow
def test_the_report_is_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "grid.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(grid()[0]))
        writer.writeheader()
        writer.writerows(grid())
    command = [sys.executable, str(BENCHMARKS / "replay.py"), "--grid", str(path)]
    run = subprocess.run([*command, "--samplers", "plan,random", "--budget", "10", "--json"], capture_output=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert set(report["samplers"]) == {"plan", "random"}
    assert report["samplers"]["plan"]["regret_after_10"] <= 0.05
    assert "regret_after_15" not in report["samplers"]["plan"]
    assert "regret_after_5" in report["gates"]
    wrong = subprocess.run([*command, "--samplers", "best"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "found best" in wrong.stderr
