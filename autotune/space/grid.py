"""`Grid`: every combination of the axes with its verdict, as one array with a dimension an axis.

A rule is asked only about the combinations of the axes that it reads, a small table that numpy spreads over the grid.
So millions of combinations cost what a few hundred do, and a byte each.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from autotune.space.legality import AXES_OF_CONDITIONS, applies
from autotune.spec.config import Scalar, TrialConfig

LEGAL = 0
REPEATED = 1
"""Differs from an earlier combination only in axes that do not apply: the same config."""
FIRST_REASON = 2

BLOCK = 2**18
"""Cells that are counted at a time, in 64-bit integers: two MiB, which stay in the processor's cache."""

MakeConfig = Callable[[dict[str, Any]], TrialConfig]
Judge = tuple[Sequence[str], Callable[[TrialConfig], str | None]]
"""The fields that a rule reads, and the rule: the reason why a config is illegal, or None."""


@dataclass(frozen=True)
class Grid:
    """The judged combinations, in the order of `itertools.product` over the axes."""

    axes: Mapping[str, tuple[Scalar, ...]]
    """Axis name to its values, all different."""
    dimensions: tuple[str, ...]
    """The axes with a choice: those with one value would be dimensions of length one, and numpy has only so many."""
    verdicts: NDArray[np.unsignedinteger[Any]]
    """One dimension for each of `dimensions`: `LEGAL`, `REPEATED`, or `FIRST_REASON` + index into `reasons`."""
    reasons: tuple[str, ...]
    applies: Mapping[str, NDArray[np.bool_]]
    """Where a conditional axis applies, as an array that broadcasts to `verdicts`; axes not in it always do."""

    @classmethod
    def judged(cls, axes: Mapping[str, tuple[Scalar, ...]], make_config: MakeConfig, judges: Sequence[Judge]) -> Self:
        """Judge every combination.

        Args:
            axes: axis name to its values, all different.
            make_config: the config that one value per axis describes.
            judges: the rules; the first that refuses a combination gives its reason.
        """
        dimensions = tuple(axis for axis, values in axes.items() if len(values) > 1)
        shape = tuple(len(axes[axis]) for axis in dimensions)
        first = {axis: values[0] for axis, values in axes.items()}

        def table(reads: Sequence[str], ask: Callable[[TrialConfig], int]) -> NDArray[np.intp]:
            """The answers to every combination of the axes in `reads`, in a shape that broadcasts to the grid."""
            read = [axis for axis in dimensions if axis in reads]
            combinations = itertools.product(*(axes[axis] for axis in read))
            answers = [ask(make_config(first | dict(zip(read, values, strict=True)))) for values in combinations]
            return np.array(answers, dtype=np.intp).reshape([len(axes[a]) if a in read else 1 for a in dimensions])

        codes: dict[str | None, int] = {None: LEGAL}

        def code(reason: str | None) -> int:
            return codes.setdefault(reason, FIRST_REASON + len(codes) - 1)

        def judge_with(rule: Callable[[TrialConfig], str | None]) -> Callable[[TrialConfig], int]:
            return lambda config: code(rule(config))

        tables = [table(reads, judge_with(rule)) for reads, rule in judges]
        verdicts = np.zeros(shape, dtype=np.min_scalar_type(FIRST_REASON + len(codes)))
        for refused in reversed(tables):  # so that the first rule has the last word
            np.copyto(verdicts, refused, where=refused != LEGAL, casting="unsafe")
        conditional = {}
        for axis in axes:
            where = table(AXES_OF_CONDITIONS, partial(applies, axis)).astype(np.bool_)
            if where.all():
                continue
            conditional[axis] = where
            if axis in dimensions:
                later = np.arange(len(axes[axis])).reshape([-1 if d == axis else 1 for d in dimensions]) > 0
                np.copyto(verdicts, REPEATED, where=~where & later)
        return cls(axes, dimensions, verdicts, tuple(reason for reason in codes if reason is not None), conditional)

    @cached_property
    def legal(self) -> NDArray[np.int32]:
        """(candidates,): the cells of the legal combinations, ascending; a cell is an index into the flat grid."""
        return np.flatnonzero(self.verdicts == LEGAL).astype(np.int32)

    @cached_property
    def illegal(self) -> Counter[str]:
        """How many distinct configs each reason refuses, by first appearance."""
        return self._count(self.verdicts)

    def illegal_with(self, axis: str, at: int) -> Counter[str]:
        """The same of the configs that have the `at`-th value of an axis."""
        part: list[int | slice] = [slice(None)] * len(self.dimensions)
        if axis in self.dimensions:
            part[self.dimensions.index(axis)] = at
        verdicts = self.verdicts[tuple(part)]
        if axis in self.applies:
            here = np.broadcast_to(self.applies[axis], self.verdicts.shape)[tuple(part)]
            verdicts = np.where(here, verdicts, REPEATED)
        return self._count(verdicts)

    def indexes(self, axis: str, cells: NDArray[np.int32]) -> NDArray[np.int32]:
        """Indexes into the axis' values, of the shape of `cells`; zeros where it does not apply."""
        if axis not in self.dimensions:
            return np.zeros_like(cells)
        at = self.dimensions.index(axis)
        stride = int(np.prod(self.verdicts.shape[at + 1 :], dtype=np.int64))
        return cells // np.int32(stride) % np.int32(self.verdicts.shape[at])

    def values(self, cell: int) -> dict[str, Scalar]:
        """One value per axis, the first where it does not apply."""
        found = {axis: values[0] for axis, values in self.axes.items()}
        for axis in reversed(self.dimensions):
            cell, at = divmod(cell, len(self.axes[axis]))
            found[axis] = self.axes[axis][at]
        return found

    def cell(self, values: Mapping[str, Scalar]) -> int:
        """The inverse of `values`. A value that is not on the axis counts as its first."""
        cell = 0
        for axis in self.dimensions:
            allowed = self.axes[axis]
            cell = cell * len(allowed) + (allowed.index(values[axis]) if values[axis] in allowed else 0)
        return cell

    def _count(self, verdicts: NDArray[Any]) -> Counter[str]:
        flat, codes = verdicts.reshape(-1), FIRST_REASON + len(self.reasons)
        counts, firsts, in_block = np.zeros((3, codes), dtype=np.int64)
        for start in range(0, flat.size, BLOCK):
            block = flat[start : start + BLOCK]
            found = np.bincount(block, minlength=codes)
            new = np.flatnonzero((counts == 0) & (found > 0))
            if new.size:
                in_block[block[::-1]] = np.arange(block.size)[::-1]  # the last one written is the first one there
                firsts[new] = start + in_block[new]
            counts += found
        seen = FIRST_REASON + np.flatnonzero(counts[FIRST_REASON:])
        order = seen[np.argsort(firsts[seen], kind="stable")]
        return Counter({self.reasons[code - FIRST_REASON]: int(counts[code]) for code in order})
