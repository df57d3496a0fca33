"""What a person sees: live on a terminal, one line a trial elsewhere."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from autotune.report.terminal import Progress, result_panel
from autotune.spec.outcome import FailureKind, Outcome
from autotune.store.store import SqlStore, open_store
from autotune.study import Study
from tests.samples import MIB, failure, measurement, sample_space


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(f"sqlite:///{tmp_path}/a.db", create=True) as opened:
        yield opened


def shown(tmp_path: Path, store: SqlStore, *, terminal: bool) -> str:
    """Everything printed while four trials run."""
    outcomes: list[Outcome] = [
        measurement(100.0),
        measurement(900.0, used_bytes=59 * MIB),
        failure(requested_bytes=3 * MIB),
        failure(FailureKind.INVALID_CONFIG, message="the library\nrefuses"),
    ]
    study = Study.open(sample_space(tmp_path, budget={"trials": 4}), store)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    left = iter(study.space.candidates)
    with Progress(study, console) as progress:
        study.observers.append(progress)
        for outcome in outcomes:
            attempt = study.next_attempt(lambda: next(left))
            assert attempt is not None
            study.record(attempt, outcome)
    console.print(result_panel(study, {}))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_every_trial_is_shown_with_what_became_of_it(tmp_path: Path, store: SqlStore, terminal: bool) -> None:
    text = shown(tmp_path, store, terminal=terminal)
    for words in ("100 tokens/s/GPU", "900 tokens/s/GPU", "+3.0 MiB in backward, rank 1", "invalid config"):
        assert words in text
    assert "2 complete, 1 out of memory, 1 failed" in text
    assert ("\x1b[" in text) == terminal


def test_the_fastest_trial_without_headroom_says_why_it_does_not_win(tmp_path: Path, store: SqlStore) -> None:
    text = shown(tmp_path, store, terminal=True)
    assert "too little headroom" in text
    assert "1.00x the baseline's 100" in text


def test_plain_lines_name_the_reason_of_a_failure_on_one_line(tmp_path: Path, store: SqlStore) -> None:
    lines = shown(tmp_path, store, terminal=False).splitlines()
    assert any(line.startswith("[4/4] trial 4: invalid config") and "the library refuses" in line for line in lines)
