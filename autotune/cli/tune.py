"""`autotune tune`: run or resume a study."""

import os
import signal
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from autotune.cli.options import DEFAULT_STORE, JsonOption, StoreOption, print_json
from autotune.errors import ExitCode, StoreError, StudyBusyError, UsageError

if TYPE_CHECKING:
    from autotune.study import Study


class Sampler(StrEnum):
    """What `--sampler` takes; `autotune.search.samplers` builds them."""

    PLAN = "plan"
    TPE = "tpe"
    GP = "gp"
    RANDOM = "random"


class Launcher(StrEnum):
    """What `--launcher` takes; `autotune.search.runner` knows them."""

    POOL = "pool"
    RAY_TRAIN = "ray-train"


def tune(
    space_path: Annotated[Path, typer.Argument(metavar="SPACE", help="Search-space file (YAML).")],
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[Path | None, typer.Option(help="Folder for logs and best files (autotune-out/STUDY).")] = None,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster; without it, one is started here.")
    ] = None,
    sampler: Annotated[Sampler, typer.Option(help="Who proposes the next config.")] = Sampler.PLAN,
    launcher: Annotated[Launcher, typer.Option(help="Who starts a trial's processes.")] = Launcher.POOL,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    learn: Annotated[
        bool, typer.Option("--learn", help="Begin with what other studies in the store taught on equal hardware.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run or resume a study; print the best config and where its files are."""
    from autotune.space.file import read_space_file
    from autotune.space.space import load_space

    talk = Console(stderr=True)
    file, _ = read_space_file(space_path)
    if file.objective.minimize is not None and sampler is not Sampler.PLAN:
        raise UsageError(
            f"{space_path}: objective.minimize: found --sampler {sampler.value}, which looks for the fastest alone;"
            " use --sampler plan, or leave the key out"
        )
    space = None if file.cluster == "auto" else load_space(space_path)
    if learn and sampler is not Sampler.PLAN:
        raise UsageError(f"--learn: found --sampler {sampler.value}, which knows no predictions; use --sampler plan")
    if file.script is not None and launcher is Launcher.RAY_TRAIN:
        raise UsageError(f"{space_path}: script: is run by launcher pool alone; leave out --launcher ray-train")

    from autotune.search.address import require_reachable
    from autotune.search.authentication import authenticate

    if address is not None:
        require_reachable(address)
    authenticate(address)
    from autotune.search.cluster import connected, detect, require, require_local

    if space is not None and address is None:
        require_local(space.cluster)
    folder = _output_folder(out or Path("autotune-out") / file.study)

    from autotune.export import export_best
    from autotune.metrics import StudyMetrics
    from autotune.predict.plan import plan_memory
    from autotune.predict.remedies import remedies, require_feasible, underestimate
    from autotune.report.documents import remedies_document, study_document
    from autotune.report.terminal import Progress, Tracing, result_panel, say_measuring
    from autotune.search.earlier import earlier_trials
    from autotune.search.runner import LauncherName, run_study
    from autotune.search.samplers import SamplerName
    from autotune.search.sensitivity import find_sensitivity
    from autotune.store.lease import Lease
    from autotune.store.store import open_store
    from autotune.study import Study

    signal.signal(signal.SIGTERM, _interrupt)
    with (
        open_store(store, create=True) as database,
        Lease(database, file.study, on_lost=_stop_this_process) as lease,
        connected(address, space.cluster if space else None),
    ):
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has replaced the handler
        if space is None:
            space = load_space(space_path, detect())
        require(space.cluster)
        with Tracing(talk) as on_traced:
            plan = plan_memory(space, on_traced, lambda: say_measuring(talk))
            require_feasible(plan, on_traced)
        study = Study.open(space, database, plan)
        earlier = earlier_trials(database, plan) if learn else None
        if earlier is not None:
            talk.print(earlier.words, style="dim", soft_wrap=True)
        with Progress(study, talk) as progress:
            study.observers += [progress, StudyMetrics(study)]
            try:
                run_study(study, SamplerName(sampler), folder / "logs", seed, LauncherName(launcher), plan, earlier)
            except (KeyboardInterrupt, StoreError):
                if lease.lost:
                    raise _taken_over(study) from None
                raise
        if study.sensitivity is None and (found := find_sensitivity(study, plan, earlier)) is not None:
            study.keep_sensitivity(found)
        artifacts = export_best(study, folder)
    advice = None
    if study.best() is None and (study.counts.out_of_memory or study.counts.complete) and plan.knows_memory:
        with Tracing(talk) as on_traced:
            advice = remedies(plan, underestimate(plan, study.results), on_traced)
    (talk if as_json else Console()).print(result_panel(study, artifacts, advice))
    if as_json:
        print_json(study_document(study, artifacts) | {"advice": None if advice is None else remedies_document(advice)})
    raise typer.Exit(_exit_code(study))


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # from the lease's thread; the handler raises in the main one


def _taken_over(study: "Study") -> StudyBusyError:
    return StudyBusyError(
        f"study {study.space.name!r} was taken over by another driver while this one gave no sign of life;"
        " its trials are in the store, and this driver leaves them to the other"
    )


def _output_folder(out: Path) -> Path:
    """Where results go; the first that is written makes it, so a study that is refused leaves nothing behind."""
    folder = out.absolute()
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); name a writable folder with --out") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{folder}: cannot be written in {nearest}; name a writable folder with --out")
    return folder


def _exit_code(study: "Study") -> ExitCode:
    counts = study.counts
    if study.best() is not None:
        return ExitCode.DONE
    if counts.failed and not counts.out_of_memory and not counts.complete:
        return ExitCode.EVERY_TRIAL_FAILED
    return ExitCode.NOTHING_FEASIBLE
