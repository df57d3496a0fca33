"""What a study of the user's own script must say, and which of its candidates the script can be told."""

import re
from pathlib import Path

from autotune.errors import InvalidSpaceError, UsageError, shown
from autotune.formats.script import FILES, allowed, axes_told, names
from autotune.formats.targets import READ_BY_TARGETS, Target, cannot_express
from autotune.space.file import ScriptSection, SpaceFile
from autotune.space.rule import DEGREES, Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.script import ScriptRun
from autotune.spec.workload import Workload

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""Of a knob, and of a variable of the environment."""


def script_run(file: SpaceFile, folder: Path) -> ScriptRun | None:
    """The script as trials start it; None where the study runs our own engines."""
    section = file.script
    if section is None:
        return None
    return ScriptRun(
        command=tuple(section.command),
        environment=tuple(section.environment.items()),
        launch=section.launch,
        accumulation=section.accumulation,
        folder=str(folder.absolute()),
        model=file.model,
    )


def check_script(file: SpaceFile, axes: dict[str, int], where: str, folder: Path | None) -> None:
    """Refuse a script section that could not be run, or that leaves an axis out.

    Args:
        file: the whole document.
        axes: how many values each has.
        where: names the file in messages.
        folder: in which the script must lie; None where it is not looked for.

    Raises:
        InvalidSpaceError: see above.
    """
    section = file.script
    if section is None:
        if file.search.script or (file.baseline is not None and file.baseline.script):
            raise InvalidSpaceError(f"{where}: search.script: has knobs, but there is no script; add script.command")
        return
    if "targets" in file.model_fields_set:
        raise InvalidSpaceError(f"{where}: targets: stands beside script, which runs the winner itself; remove targets")
    for knob in file.search.script:
        if not _NAME.fullmatch(knob) or knob in allowed(()):
            raise InvalidSpaceError(
                f"{where}: search.script: found {shown(knob)}; a knob is named by letters, digits and _,"
                " unlike any other placeholder"
            )
    for knob in () if file.baseline is None else file.baseline.script:
        if knob not in file.search.script:
            raise InvalidSpaceError(f"{where}: baseline.script: found {shown(knob)}, which is no knob of search.script")
    told = _placeholders(section, tuple(file.search.script), where)
    _check_axes(file, axes, told, where)
    if folder is not None:
        _check_files(section, folder, where)


def script_rules(section: ScriptSection) -> tuple[Rule, ...]:
    """What the files that the command names cannot tell the script, on the hardware of the study."""
    named = sorted(names([*section.command, *section.environment.values()]) & FILES.keys())
    told = (_expressed(name, target) for name in named for target in FILES[name].targets)
    return (_no_folder, _own_layers, *told)


@reads("offload")
def _no_folder(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.swaps:
        return None
    return f"offload {config.offload} is not run with a script, which may use a disk as it likes; use our engines"


@reads("device_map")
def _own_layers(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    return None if config.device_map == "none" else "device_map auto is run by our engine; a script has one rank a GPU"


def _expressed(name: str, target: Target) -> Rule:
    @reads(*READ_BY_TARGETS, "precision", "zero_stage", "gpus", *DEGREES)
    def told(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
        reason = cannot_express(target, config, cluster.device)
        return None if reason is None else f"{{{name}}} cannot say it: {reason}"

    return told


def _placeholders(section: ScriptSection, knobs: tuple[str, ...], where: str) -> set[str]:
    known = allowed(knobs)
    told: set[str] = set()
    templates = [("script.command", word) for word in section.command]
    for variable, value in section.environment.items():
        if not _NAME.fullmatch(variable):
            raise InvalidSpaceError(
                f"{where}: script.environment: found {shown(variable)}; a variable is named by letters, digits and _"
            )
        templates.append((f"script.environment.{variable}", value))
    for key, template in templates:
        try:
            found = names([template])
        except UsageError as error:
            raise InvalidSpaceError(f"{where}: {key}: {error}") from None
        for name in sorted(found - set(known)):
            raise InvalidSpaceError(
                f"{where}: {key}: found the placeholder {{{name[:80]}}}; there are {', '.join(known)},"
                " and those that you name under search.script"
            )
        told |= found
    return told


def _check_axes(file: SpaceFile, axes: dict[str, int], told: set[str], where: str) -> None:
    reached = axes_told(told)
    for axis, count in axes.items():
        group, _, name = axis.partition(".")
        if group == "script" and axis not in reached:
            raise InvalidSpaceError(
                f"{where}: search.{axis}: is passed nowhere; write {{{name}}} into script.command or script.environment"
            )
        if count > 1 and axis != "gpus" and group != "script" and not reached & {group, axis}:
            stated = "" if group in file.search.model_fields_set else " by default"
            remedy = f"{{{axis}}}" if group == axis else "{ds_config}"
            raise InvalidSpaceError(
                f"{where}: search.{axis}: has {count} values{stated}, but script.command passes neither {remedy} nor a"
                " file that has it; pass it, or state one value"
            )
    if "accelerate" in told and "deepspeed" in file.search.engine and "ds_config" not in told:
        raise InvalidSpaceError(
            f"{where}: script.command: passes {{accelerate}}, which names DeepSpeed's file on engine deepspeed;"
            " add --deepspeed_config_file {ds_config}, or search engine pytorch alone"
        )


def _check_files(section: ScriptSection, folder: Path, where: str) -> None:
    for word in section.command:
        if word.endswith(".py") and "{" not in word and not (folder / word).is_file():
            raise InvalidSpaceError(
                f"{where}: script.command: found {shown(word)}, which is no file in {folder}; scripts are looked for"
                " beside the search-space file"
            )
