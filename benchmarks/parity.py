"""Does every engine, layout and method train like a plain loop? The table of what the tests compare.

    python benchmarks/parity.py [--json] [-k EXPRESSION]

Runs all tests of `tests/engines`, the slow ones too, and writes down what each of their comparisons saw: four optimizer
steps of a small Qwen3 on 1 to 8 gloo ranks against the plain loop of `tests/engines/parity.py`, as the largest relative
difference of a step's loss, and of its global gradient norm before clipping. The cases, the reference and the
tolerances are the tests' own. A row has the cases of one engine, method, number of ranks, division of the model and
precision; its differences are the largest of them. Below it stand the engines that tests have made wrong on purpose:
each has to be told from the reference. With `--json` the last line is one object with every case.

Takes some minutes on two free cores. Exits with 1 if a test fails.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from autotune.spec.config import TrialConfig  # noqa: E402  # only the path above makes these importable from anywhere
from autotune.spec.request import TrialRequest  # noqa: E402  # the same
from tests.engines import parity  # noqa: E402  # the tests are no installed package


@dataclass(frozen=True, slots=True)
class Case:
    """One rank's four steps against the reference."""

    test: str
    engine: str
    """Or the class that a test runs in its place."""
    method: str
    precision: str
    ranks: int
    layout: str
    config: str
    loss_difference: float
    """The largest of any step, as a ratio of the reference's loss."""
    norm_difference: float
    equal: bool
    """Within the test's tolerances."""


class Recorder:
    """A pytest plugin that keeps what `assert_equal` is asked, with the trial that ran last."""

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self.failed: set[str] = set()
        self._test = ""
        self._trial: tuple[TrialConfig, str] | None = None
        self._compare = parity.assert_equal
        run = parity.Ranks.run

        def run_and_remember(
            ranks: parity.Ranks, function: Callable[..., Any], *arguments: Any, **limits: float
        ) -> list[Any]:
            trial = next((each for each in arguments if isinstance(each, TrialRequest)), None)
            build = next((each for each in arguments if callable(each)), None)
            if trial is not None:
                wrong = "" if build is None or build.__name__ == "build_engine" else build.__name__
                self._trial = trial.config, wrong
            return run(ranks, function, *arguments, **limits)

        # Before the tests import them.
        parity.Ranks.run = run_and_remember  # type: ignore[method-assign, assignment]  # a class is patched on purpose: each run is written down
        parity.assert_equal = self._assert_equal

    def _assert_equal(self, trace: parity.Trace, reference: parity.Trace, **tolerances: float) -> None:
        assert self._trial is not None
        config, wrong = self._trial
        equal = False
        try:
            self._compare(trace, reference, **tolerances)
            equal = True
        finally:
            self.cases.append(
                Case(
                    test=self._test,
                    engine=wrong or config.engine,
                    method=config.method,
                    precision=config.precision,
                    ranks=config.gpus,
                    layout=division(config),
                    config=config.describe(),
                    loss_difference=largest(trace.losses, reference.losses),
                    norm_difference=largest(trace.norms, reference.norms),
                    equal=equal,
                )
            )

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:
        """Told of each test that begins."""
        self._test = nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Told how each phase of it ended."""
        if report.failed:
            self.failed.add(report.nodeid)


def division(config: TrialConfig) -> str:
    """Over what ranks the model, its layers or its sequences are divided; the rest is data-parallel."""
    degrees = {
        "groups": config.data_parallel_replicate_size,
        "tp": config.tensor_parallel_size,
        "sp": config.sequence_parallel_size,
        "pp": config.pipeline_parallel_size,
    }
    words = [f"dp {config.data_parallel_size}"] if config.data_parallel_size > 1 else []
    words += [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    return " ".join([*words, config.pipeline_schedule or ""]).strip() or "one rank"


def largest(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest difference of any step, as a ratio."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True))


def table(cases: Iterable[Case]) -> list[str]:
    """Rows of Markdown."""

    def row(case: Case) -> tuple[Any, ...]:
        return case.engine, case.method, case.ranks, case.layout, case.precision

    lines = [
        "| engine | method | ranks | layout | precision | configs | loss | gradient norm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, group in itertools.groupby(sorted(cases, key=row), row):
        found = list(group)
        configs = len({case.config for case in found})
        loss, norm = (max(getattr(case, name) for case in found) for name in ("loss_difference", "norm_difference"))
        lines.append(f"| {' | '.join(map(str, key))} | {configs} | {loss:.1e} | {norm:.1e} |")
    return lines


def main() -> int:
    """Run the tests and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print every case as one JSON object, the last line")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="some tests only, as pytest's own")
    options = parser.parse_args()
    recorder = Recorder()
    folder = str(ROOT / "tests" / "engines")
    code = pytest.main(["-q", "-m", "", "-k", options.k, "-p", "no:cacheprovider", folder], plugins=[recorder])
    wrong = [case for case in recorder.cases if not case.equal and case.test not in recorder.failed]
    failed = [case for case in recorder.cases if not case.equal and case.test in recorder.failed]
    print("\n".join(table(case for case in recorder.cases if case.equal)))
    for title, cases in (("Wrong on purpose, and found:", wrong), ("FAILED:", failed)):
        if cases:
            print("\n".join(["", title, "", *table(cases)]))
    print(
        f"\n{len({case.config for case in recorder.cases if case.equal})} configs equal; {len(failed)} traces are not"
    )
    if options.json:
        print(json.dumps({"cases": [asdict(case) for case in recorder.cases], "failed": sorted(recorder.failed)}))
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
