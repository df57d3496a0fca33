"""A study in the terminal: live while it runs, one line a trial when the output is no terminal, and its result."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autotune.confirmation import ROUNDS
from autotune.predict.remedies import NO_REMEDY, Remedy
from autotune.report.sensitivity import constraint_text
from autotune.report.verdict import confirmation_text, gain_text, notes, speed_text
from autotune.results import Counts, Result
from autotune.space.space import Space
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome
from autotune.spec.prediction import Prediction
from autotune.spec.record import TrialRecord
from autotune.study import Attempt, Study
from autotune.units import format_bytes, format_rate, format_seconds

SHOWN_TRIALS = 14


def headline(space: Space) -> RenderableType:
    """What is about to be searched."""
    model = f"{space.model.name} ({space.model.num_parameters / 1e9:.2f} B parameters)"
    if space.model.num_parameters < 1e8:
        model = f"{space.model.name} ({space.model.num_parameters / 1e6:.2f} M parameters)"
    refused = sum(space.illegal.values())
    budget = space.file.budget
    limits = [f"{budget.trials} trials"]
    limits += [f"{budget.minutes:g} minutes"] if budget.minutes else []
    limits += [f"{budget.gpu_hours:g} GPU-hours"] if budget.gpu_hours else []
    workload = f"global batch {space.workload.global_batch_size} x {space.file.workload.sequence_length} tokens"
    lines = [
        Text.assemble(
            ("autotune ", "bold cyan"),
            (space.name, "bold"),
            f"  {model} on {space.cluster.describe()}, {workload}",
        ),
        Text(
            f"{len(space.candidates)} candidates, {refused} combinations refused as illegal, "
            f"budget {', '.join(limits)}",
            "dim",
        ),
    ]
    lines += [Text(f"dropped {d.axis} {d.value}: {d.reason}", "dim") for d in space.dropped]
    return Group(*lines)


def outcome_text(outcome: Outcome) -> Text:
    """An outcome in a few words."""
    if isinstance(outcome, Measurement):
        return Text(f"{format_rate(outcome.tokens_per_second_per_gpu):>7} tokens/s/GPU", "green")
    if outcome.kind is FailureKind.STOPPED_EARLY:
        most = format_rate(outcome.most_tokens_per_second_per_gpu or 0.0)
        return Text(f"stopped early, at most {most} tokens/s/GPU", "dim")
    style = "yellow" if outcome.kind.is_memory else "red"
    return Text(outcome.kind.value.replace("_", " "), style)


def memory_text(outcome: Outcome) -> str:
    """Peak memory, or what was asked for when it ran out."""
    if isinstance(outcome, Measurement):
        return format_bytes(outcome.peak_device_used_bytes)
    if outcome.kind.is_memory:
        where = (
            f"in {outcome.phase.value}" if outcome.rank is None else f"in {outcome.phase.value}, rank {outcome.rank}"
        )
        return f"+{format_bytes(outcome.requested_bytes)} {where}" if outcome.requested_bytes else where
    if outcome.peak_device_used_bytes is not None:
        return format_bytes(outcome.peak_device_used_bytes)
    return outcome.phase.value


def trial_table(rows: Iterable[Result], study: Study) -> Table:
    """Trials, one a row, with their predicted memory if there is any; those that cannot win say why."""
    rows = list(rows)
    predictions = [study.prediction(row.config) for row in rows]
    predicted = any(prediction is not None for prediction in predictions)
    timed = any(prediction is not None and _expected_speed(prediction) for prediction in predictions)
    best, baseline, outside = study.best(), study.space.baseline, study.outside
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("outcome")
    table.add_column("peak memory")
    if predicted:
        table.add_column("predicted", justify="right")
    if timed:
        table.add_column("predicted speed", justify="right")
    table.add_column("config")
    for (number, config, outcome), prediction in zip(rows, predictions, strict=True):
        mark = " (best)" if best is not None and best.trial == number else ""
        mark += " (baseline)" if config == baseline else ""
        if config in outside:
            mark += " (outside the present axes)"
        elif isinstance(outcome, Measurement) and not study.eligible(outcome):
            mark += " (too little headroom)"
        cells: list[RenderableType] = [str(number), outcome_text(outcome), memory_text(outcome)]
        if predicted:
            cells.append(format_bytes(prediction.device_used_bytes) if prediction is not None else "")
        if timed:
            speed = None if prediction is None else _expected_speed(prediction)
            cells.append("" if speed is None else format_rate(speed))
        table.add_row(*cells, Text(config.describe() + mark))
    return table


def _expected_speed(prediction: Prediction) -> float | None:
    """Tokens per second and GPU that were expected at launch; None where speed is not predicted."""
    if prediction.tokens_per_second_per_gpu is None or prediction.proposal is None:
        return prediction.tokens_per_second_per_gpu
    return prediction.proposal["throughput"]


def why_text(trial: TrialRecord) -> str:
    """Why a trial was launched, in one sentence."""
    name = f"Trial {trial.number}, {trial.config.describe()},"
    if trial.source == "baseline":
        return f"{name} is the baseline of the file."
    if trial.prediction is None or (found := trial.prediction.proposal) is None:
        return f"{name} was chosen by a sampler that gives no reasons, or before reasons were kept."
    speed, spread = found["throughput"] or 0.0, found["throughput_deviation"] or 0.0
    words = [f"{name} was expected to reach {format_rate(speed)} tokens/s/GPU, give or take {spread:.0%}"]
    if found["best_throughput"] is None and trial.prediction.tokens_per_second_per_gpu is None:
        words = [f"{name} was chosen before anything was measured, where speed is not predicted"]
    elif found["best_throughput"] is None:
        words.append("before anything was measured that fits")
    else:
        words.append(f"where the best so far had {format_rate(found['best_throughput'])}")
        words.append(f"so that a launch promised a gain of {found['expected_gain'] or 0.0:.1%}")
    words.append(
        f"it fits with probability {found['fit_probability']:.2f} and runs with {found['run_probability']:.2f}"
    )
    words.append(f"by expected speed it was number {found['rank_by_throughput']} of those not yet launched")
    return ", ".join(words) + "."


def counts_text(counts: Counts) -> str:
    """Finished trials by what became of them."""
    words = f"{counts.complete} complete, {counts.out_of_memory} out of memory, {counts.failed} failed"
    return f"{words}, {counts.stopped_early} stopped early" if counts.stopped_early else words


def cost_text(study: Study) -> str:
    """What the study cost, over all its runs, and what that went into."""
    spent = study.spending.gpu_seconds_by_use
    parts = [f"{use.value.replace('_', ' ')} {_gpu_time(seconds)}" for use, seconds in spent.items() if seconds]
    return f"{_gpu_time(sum(spent.values()))}: {', '.join(parts)}"


def _gpu_time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} GPU-hours" if seconds >= 3600 else f"{seconds / 60:.1f} GPU-minutes"


def ledger_text(study: Study) -> str:
    """How well memory and speed were predicted, in a few words; empty where nothing was predicted and measured."""
    ledger = study.ledger
    if not ledger.errors:
        return ""
    words = (
        f"memory of {len(ledger.errors)} trials within {ledger.largest_error:.2%} (median {ledger.median_error:.2%})"
    )
    if ledger.surprises:
        trials = ", ".join(f"#{number}" for number in ledger.surprises)
        words += f"; predicted to fit, and did not: {trials}"
    if ledger.speed_errors:
        words += f"; speed off by {ledger.median_speed_error:.0%} as first predicted"
        words += f", by {ledger.median_launch_error:.0%} as expected at launch" if ledger.launch_errors else ""
    return words


class Progress:
    """Shows a running study; an `Observer` of it and a context manager around the run."""

    def __init__(self, study: Study, console: Console) -> None:
        self._study, self._console = study, console
        self._rows: list[Result] = list(study.results)
        self._running: dict[int, tuple[Attempt, float]] = {}
        self._finished_at: list[float] = []
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._console.print(headline(self._study.space), soft_wrap=not self._console.is_terminal)
        done = self._study.counts.finished
        if done:
            self._console.print(Text(f"resumed with {done} finished trials", "dim"))
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
            self._console.print(trial_table(self._rows, self._study))

    def started(self, attempt: Attempt) -> None:
        """An attempt was handed to the runner."""
        self._running[attempt.id] = (attempt, time.monotonic())

    def finished(self, attempt: Attempt, outcome: Outcome) -> None:
        """Its outcome is in the store."""
        self._running.pop(attempt.id, None)
        if attempt.turn is not None:
            if not self._console.is_terminal:
                self._console.print(Text(self._confirming(attempt, outcome)), soft_wrap=True)
            return
        self._finished_at.append(time.monotonic())
        if self._study.settled(attempt.config):
            self._rows.append(Result(attempt.trial, attempt.config, outcome))
        if self._console.is_terminal:
            return
        counts = self._study.counts
        words = [
            f"[{counts.finished}/{self._study.space.file.budget.trials}]",
            f"trial {attempt.trial}:",
            outcome_text(outcome).plain.strip() + ",",
            f"{memory_text(outcome)}, {attempt.config.describe()}",
        ]
        if not self._study.settled(attempt.config):
            words.append("(runs again)")
        told = (
            outcome.kind.is_memory or outcome.kind is FailureKind.STOPPED_EARLY
            if isinstance(outcome, Failure)
            else True
        )
        if isinstance(outcome, Failure) and not told:
            words.append(f"({' '.join(outcome.message.split())[:200]})")
        self._console.print(Text(" ".join(words)), soft_wrap=True)

    def _confirming(self, attempt: Attempt, outcome: Outcome) -> str:
        assert attempt.turn is not None
        words = f"confirming trial {attempt.trial}, run {attempt.turn.round} of {ROUNDS}: "
        words += outcome_text(outcome).plain.strip()
        if isinstance(outcome, Measurement):
            return f"{words} over {self._steps} optimizer steps, {memory_text(outcome)}"
        return f"{words} ({' '.join(outcome.message.split())[:200]})"

    @property
    def _steps(self) -> int:
        return -(-self._study.space.file.measure.confirm_steps // ROUNDS)

    def _render(self) -> RenderableType:
        # The display runs in its own thread; the copies keep it off lists that change meanwhile.
        rows, running = self._rows[-SHOWN_TRIALS:], list(self._running.values())
        parts: list[RenderableType] = [trial_table(rows, self._study)] if rows else []
        now = time.monotonic()
        for attempt, since in running:
            doing = "running" if attempt.turn is None else f"confirming, run {attempt.turn.round} of {ROUNDS}"
            words = f"{attempt.trial:>2} {doing} {format_seconds(now - since):>7}  {attempt.config.describe()}"
            parts.append(Text(words, "cyan"))
        if not rows and not running:
            parts.append(Text("starting Ray and the workers", "dim"))
        parts.append(self._footer())
        return Group(*parts)

    def _footer(self) -> RenderableType:
        counts, total = self._study.counts, min(self._study.space.file.budget.trials, len(self._study.worth_a_launch))
        best = self._study.best()
        words = f"{counts.finished}/{total}  {counts.complete} complete, "
        words += f"{counts.out_of_memory} out of memory, {counts.failed} failed"
        if best is not None:
            words += f"   best {format_rate(best.measurement.tokens_per_second_per_gpu)} tokens/s/GPU (#{best.trial})"
        if len(self._finished_at) >= 2:
            pace = (self._finished_at[-1] - self._finished_at[0]) / (len(self._finished_at) - 1)
            words += f"   {format_seconds(pace * max(0, total - counts.finished))} left"
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=total, completed=counts.finished, width=16), Text(words))
        return grid


class Tracing:
    """Shows how far the tracing of structures is, if there is any; a context manager around it."""

    def __init__(self, console: Console) -> None:
        self._progress = rich.progress.Progress(
            "tracing the training step", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._console = console
        self._task: TaskID | None = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self._on_traced

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _on_traced(self, done: int, total: int) -> None:
        if self._task is None:
            if self._console.is_terminal:
                self._progress.start()
            else:
                self._console.print(f"tracing the training step of {total} structures, which are kept for later")
            self._task = self._progress.add_task("", total=total)
        self._progress.update(self._task, completed=done)


def say_measuring(console: Console) -> None:
    """What a first plan on a machine of CPUs waits for."""
    console.print("timing this machine's processors, once: some ten seconds", style="dim", soft_wrap=True)


def result_panel(study: Study, artifacts: dict[str, Path], advice: Sequence[Remedy] | None = None) -> RenderableType:
    """The verdict and where the files are; where there is none, what would help, if that was looked for."""
    best, counts = study.best(), study.counts
    summary = counts_text(counts)
    summary += f" in {format_seconds(study.spending.elapsed_seconds)}"
    if best is None:
        return _panel(_nothing_found(study, summary, advice), "nothing found", "yellow")
    measured = best.measurement
    rows: list[tuple[str, str | Text]] = [
        ("best", Text.assemble((best.config.describe(), "bold green"), f"  (trial {best.trial})")),
        ("speed", speed_text(study, best)),
    ]
    if (gain := gain_text(study, best)) is not None:
        rows.append(("gain", gain))
    if study.space.numerics:
        values = study.space.values(best.config)
        chosen = ", ".join(f"{axis} {values[axis]}" for axis in study.space.numerics)
        rows.append(("numerics", f"{chosen}: searched although it changes what is trained"))
    used, total = format_bytes(measured.peak_device_used_bytes), format_bytes(measured.device_memory_bytes)
    rows.append(("memory", f"{used} of {total} on the fullest rank"))
    rows.append(("confirmed", confirmation_text(study)))
    rows += [("", note) for note in notes(study)]
    if study.sensitivity is not None:
        rows.append(("limited by", constraint_text(study.sensitivity)))
    rows.append(("trials", summary))
    if study.stop_reason is not None:
        rows.append(("ended", study.stop_reason))
    rows.append(("cost", cost_text(study)))
    if study.forecast is not None and len(study.worth_a_launch) < len(study.space.candidates):
        refused = len(study.space.candidates) - len(study.worth_a_launch)
        rows.append(("refused", f"{refused} candidates, predicted to run out of memory"))
    if words := ledger_text(study):
        rows.append(("ledger", words))
    if artifacts:
        folder = next(iter(artifacts.values())).parent
        rows.append(("files", f"{_short(folder)}: {', '.join(artifacts)}"))
    return _panel(rows, f"study {study.space.name}", "green")


def _nothing_found(study: Study, summary: str, advice: Sequence[Remedy] | None) -> list[tuple[str, str | Text]]:
    space = study.space
    usable, total = format_bytes(space.usable_bytes), format_bytes(space.cluster.memory_bytes)
    rows: list[tuple[str, str | Text]] = [("trials", f"{summary}; none is eligible")]
    if advice is None:
        return rows
    rows.append(("limit", f"{usable} a GPU, which is {total} less {space.file.memory_headroom:.0%} headroom"))
    changes = [f"{one.words}: {format_bytes(one.device_used_bytes)} a GPU" for one in advice]
    rows += list(zip(["would fit", *[""] * len(changes)], changes or [NO_REMEDY], strict=False))
    if advice:
        rows.append(("", "by prediction; change the search-space file so, and run the same command again"))
    return rows


def _panel(rows: Iterable[tuple[str, str | Text]], title: str, style: str) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for label, value in rows:
        grid.add_row(label, value)
    return Panel(grid, title=title, border_style=style, expand=False)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
