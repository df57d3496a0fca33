"""Live memory of a deep model from two traces of shallow ones.

Decoder layers repeat, and so does what they allocate. A trace is cut at each layer's forward and backward pass; a layer
in the middle is the template of all that a deeper model has more. Over equal layers in a row a line is extreme at the
first or the last of them, so that depth costs nothing.

This holds as far as layers do repeat and sizes are products of dimensions, which is checked and not assumed: the lines
must go through a second trace, of another batch, length and depth, and those of the layer in the middle through two
layers.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.predict.segments import (
    MIDDLE,
    PARTS,
    QUANTITIES,
    TRACED_LAYERS,
    Change,
    Key,
    StructureError,
    Template,
    Trace,
    by_part,
    in_portions,
    per_part,
    quantities,
    template_of,
)
from autotune.predict.stream import Stream, highest_rows
from autotune.spec.prediction import Part

MAX_WHOLE_LAYERS = 6
"""A model no deeper is traced as it is."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What the traces of one structure say, for any depth of at least `TRACED_LAYERS`."""

    standing: NDArray[np.float64]
    """(parts,): bytes before the first micro-step."""
    standing_growth: NDArray[np.float64]
    """(parts,): further ones for each layer more."""
    templates: dict[Key, Template]
    """In order of time."""

    @classmethod
    def fit(cls, trace: Trace, deeper: Trace) -> "Structure":
        """Find the lines.

        Args:
            trace: `TRACED_LAYERS` deep, with `TRACED_LENGTH`, and one sequence or `TRACED_BATCH`.
            deeper: one layer deeper, with `CHECKED_LENGTH`, and one sequence or `CHECKED_BATCH`: it shows what grows
                with depth outside the layers, and checks the lines within them.

        Raises:
            StructureError: the traces do not fit together.
        """
        at_check = quantities(np.array([deeper.micro_batch_size]), np.array([deeper.sequence_length]))[0]
        templates: dict[Key, Template] = {}
        for key, changes in trace.segments.items():
            templates[key] = _with_growth(key, template_of(changes, trace), changes, deeper, at_check)
        standing = by_part(trace.standing)
        return cls(standing, by_part(deeper.standing) - standing, templates)

    def stream(self, layers: int, update_share: float = 1.0) -> Stream:
        """The stream of a model with so many decoder layers.

        Args:
            layers: how many.
            update_share: the share (0..1) of this rank's parameters that the update works on at a time, where the
                traces have done all at once.

        Raises:
            StructureError: fewer layers than were traced.
        """
        if layers < TRACED_LAYERS:
            raise StructureError(f"found {layers} layers, but a structure needs {TRACED_LAYERS}")
        more = layers - TRACED_LAYERS
        live = np.zeros((len(PARTS), QUANTITIES))
        live[:, 0] = self.standing + more * self.standing_growth
        rows = [live[None]]
        for key, template in self.templates.items():
            for repeat in self._repeats(key, more):
                if repeat > 1:  # the layers between the first and the last of equal ones: only what they leave behind
                    live = live + (repeat - 1) * per_part(template, 0)[-1]
                steps = live + in_portions(key, per_part(template, more), update_share)
                rows.append(steps)
                live = steps[-1] if len(steps) else live
        return Stream(highest_rows(np.concatenate(rows)))

    def _repeats(self, key: Key, more: int) -> Iterator[int]:
        """How often the segment's template is applied, as one or two runs."""
        yield 1
        if key[1] in ("forward", "backward") and key[2] == MIDDLE and more:
            yield more


def _with_growth(
    key: Key, template: Template, changes: Sequence[Change], deeper: Trace, at_check: NDArray[np.float64]
) -> Template:
    """Add what a deeper model has more in the segment. Within layers nothing may differ."""
    micro_step, kind, layer = key
    expected = template.lines @ at_check
    if kind not in ("forward", "backward"):
        return _aligned(key, template, expected, changes, deeper.segments[key])
    # The deeper model's last layer is the shallow one's last.
    if not _is_like(deeper.segments[micro_step, kind, layer + (layer > MIDDLE)], expected):
        raise StructureError(f"a change in {_name(key)} is no line in batch and length")
    if layer == MIDDLE and not _is_like(deeper.segments[micro_step, kind, layer + 1], expected):
        raise StructureError(f"{_name((micro_step, kind, layer + 1))} is not like that of the layer before")
    return template


def _is_like(changes: Sequence[Change], expected: NDArray[np.float64]) -> bool:
    return len(changes) == len(expected) and np.allclose([c.bytes for c in changes], expected, rtol=1e-6, atol=64)


def _aligned(
    key: Key, template: Template, expected: NDArray[np.float64], changes: Sequence[Change], deeper: Sequence[Change]
) -> Template:
    """The template of a segment with what a layer more adds to it: larger changes, or further ones.

    What happens once a parameter, such as the creation of optimizer states, makes further changes. Those of all further
    layers are one change here, where those of the first further layer are; what they depend on is depth alone.
    """
    matcher = difflib.SequenceMatcher(None, [_role(c) for c in changes], [_role(c) for c in deeper], autojunk=False)
    lines: list[NDArray[np.float64]] = []
    growth: list[NDArray[np.float64]] = []
    sizes = np.array([change.bytes for change in deeper], np.float64)
    for tag, begin, end, deeper_begin, deeper_end in matcher.get_opcodes():
        if tag not in ("equal", "insert"):
            raise StructureError(f"{_name(key)}: {changes[begin].operator} is missing in a deeper model")
        more = sizes[deeper_begin:deeper_end]
        lines.append(template.lines[begin:end] if tag == "equal" else np.zeros((len(more), QUANTITIES)))
        growth.append(more - expected[begin:end] if tag == "equal" else more)
    # Labels are padded by one position: a few bytes a sequence that are no product, and no growth either.
    few = np.array([change.part in (Part.ACTIVATIONS, Part.LOGITS) for change in deeper])
    parts = np.array([PARTS.index(change.part) for change in deeper], np.int64)
    if not lines:
        return template
    return Template(np.concatenate(lines), np.where(few, 0.0, np.concatenate(growth)), parts)


def _role(change: Change) -> tuple[str, Part]:
    return change.operator, change.part


def _name(key: Key) -> str:
    micro_step, kind, layer = key
    return f"micro-step {micro_step}, {kind}" + (f" of layer {layer}" if kind in ("forward", "backward") else "")
