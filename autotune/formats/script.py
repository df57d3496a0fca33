"""The command of a user's own training script, with a config's values and files in place of its placeholders.

The trial fills them with its own paths, the export with what a shell finds beside `launch.sh`: both by `fill`.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from string import Formatter

import yaml

from autotune.errors import UsageError, shown
from autotune.formats.accelerate_yaml import DEEPSPEED_FILE, to_accelerate
from autotune.formats.deepspeed_json import to_deepspeed, to_hf_deepspeed
from autotune.formats.targets import Target
from autotune.formats.training_args import to_training_args
from autotune.spec.cluster import Device
from autotune.spec.config import TrialConfig
from autotune.spec.workload import Workload

PLACES = ("nodes", "node_rank", "gpus_per_node", "master_address", "master_port", "model", "output")
"""Placeholders that say where a rank is, what the model is called, and where a trial may write."""

_GROUPS = ("deepspeed", "script")
_FIELDS = tuple(field.name for field in dataclasses.fields(TrialConfig) if field.name not in _GROUPS)
_WORK = (
    "global_batch_size",
    "gradient_accumulation_steps",
    "data_parallel_size",
    "learning_rate",
    "weight_decay",
    "max_gradient_norm",
    "seed",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptFile:
    """A file that a command may name by a placeholder."""

    name: str
    targets: tuple[Target, ...]
    """Whose words it is in: what these cannot express, it cannot tell the script."""
    axes: frozenset[str]
    """What it tells the script; `deepspeed` stands for every key of DeepSpeed."""
    write: Callable[[TrialConfig, Workload, int, Device], str]
    """Its text for (config, workload, nodes, device)."""


_SHARDING = frozenset({"engine", "zero_stage", "offload", "precision", "deepspeed"})

FILES = {
    "training_args": ScriptFile(
        name="training_args.yaml",
        targets=("hf_trainer",),
        axes=_SHARDING
        | {"micro_batch_size", "activation_checkpointing", "selective_every", "optimizer", "use_liger_kernel"},
        write=lambda config, workload, _nodes, device: _yaml(to_training_args(config, workload, device)),
    ),
    "ds_config_hf": ScriptFile(
        name="ds_config.hf.json",
        targets=("hf_trainer", "deepspeed"),
        axes=_SHARDING - {"engine", "precision"},
        write=lambda config, workload, _nodes, _device: _json(to_hf_deepspeed(config, workload)),
    ),
    "ds_config": ScriptFile(
        name=DEEPSPEED_FILE,
        targets=("deepspeed",),
        axes=_SHARDING - {"engine"} | {"micro_batch_size"},
        write=lambda config, workload, _nodes, _device: _json(to_deepspeed(config, workload)),
    ),
    "accelerate": ScriptFile(
        name="accelerate.yaml",
        targets=("accelerate",),
        axes=_SHARDING - {"offload", "deepspeed"} | {"torch_compile"},
        write=lambda config, _workload, nodes, device: _yaml(to_accelerate(config, nodes, device)),
    ),
}
"""By placeholder."""


def names(templates: Iterable[str]) -> set[str]:
    """The placeholders of a command or of the values of variables.

    Raises:
        UsageError: a brace that is neither a placeholder nor doubled.
    """
    return {name for template in templates for _, name in _parts(template) if name is not None}


def allowed(knobs: Iterable[str]) -> tuple[str, ...]:
    """Every placeholder that a study with these knobs has."""
    return (*FILES, *_FIELDS, *_WORK, *PLACES, *knobs)


def axes_told(placeholders: Iterable[str]) -> set[str]:
    """The axes whose values reach a script through these placeholders, its knobs as `script.NAME`."""
    told: set[str] = set()
    for name in placeholders:
        told |= FILES[name].axes if name in FILES else {name, f"script.{name}"}
    return told


def values(config: TrialConfig, workload: Workload) -> dict[str, str]:
    """What stands for each placeholder that a config and its work decide; without files and places.

    Raises:
        ValueError: the global batch does not divide.
    """
    found: dict[str, object] = {name: getattr(config, name) for name in _FIELDS}
    for name in _WORK:
        found[name] = getattr(workload if hasattr(workload, name) else config, name)
    found["gradient_accumulation_steps"] = workload.gradient_accumulation_steps(config)
    return {name: _text(value) for name, value in {**found, **dict(config.script)}.items()}


def files(
    placeholders: Iterable[str], config: TrialConfig, workload: Workload, nodes: int, device: Device
) -> dict[str, str]:
    """The files that a command names: placeholder to text.

    Raises:
        UsageError: a file cannot express the config.
        ValueError: the global batch does not divide.
    """
    return {name: FILES[name].write(config, workload, nodes, device) for name in FILES if name in set(placeholders)}


def with_accumulation(workload: Workload, config: TrialConfig, steps: int) -> Workload:
    """The work of an optimizer step of so many micro-steps."""
    return replace(workload, global_batch_size=steps * config.micro_batch_size * config.data_parallel_size)


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its placeholders replaced.

    Raises:
        KeyError: there is no value for one.
    """
    return "".join(literal + ("" if name is None else values[name]) for literal, name in _parts(template))


def fill_for_shell(template: str, expressions: Mapping[str, str]) -> str:
    """One word of a shell's command line, its placeholders replaced by expressions of the shell.

    Raises:
        KeyError: there is no expression for one.
    """
    parts = ((shlex.quote(literal) if literal else "", name) for literal, name in _parts(template))
    return "".join(literal + ("" if name is None else expressions[name]) for literal, name in parts) or "''"


def _parts(template: str) -> list[tuple[str, str | None]]:
    """(text, the placeholder after it or None) in order; doubled braces are single ones of the text."""
    try:
        parts = list(Formatter().parse(template))
        plain = all(name is None or (name.isidentifier() and not spec and not how) for _, name, spec, how in parts)
    except ValueError:  # a brace that nothing closes
        plain = False
    if not plain:
        raise UsageError(
            f"found {shown(template)}, in which a brace opens no placeholder such as {{micro_batch_size}};"
            " write {{ and }} for braces"
        )
    return [(literal, name) for literal, name, _, _ in parts]


def _text(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _yaml(document: dict[str, object]) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _json(document: dict[str, object]) -> str:
    return json.dumps(document, indent=2) + "\n"
