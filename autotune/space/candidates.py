"""`Candidates` and `Columns`: the legal configs of a space, one by one or as arrays."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from autotune.space.grid import Grid, MakeConfig
from autotune.spec.config import Scalar, TrialConfig

ABSENT = -1
"""Index of an axis' value in candidates to which the axis does not apply."""


class Columns(Mapping[str, NDArray[np.int16]]):
    """The candidates as one array an axis, all of the shape (candidates,) and in the order of the candidates.

    `columns[axis]` has indexes into `space.axes[axis]`, `ABSENT` (-1) where the axis does not apply: a numpy array of
    the axis' values with one more for "n/a" at its end can be indexed with it as it is. An array is computed each time
    that it is asked for, in some 10 nanoseconds a candidate, and not kept.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def __getitem__(self, axis: str) -> NDArray[np.int16]:
        """The indexes of one axis.

        Raises:
            KeyError: the space has no such axis.
        """
        if axis not in self._grid.axes:
            raise KeyError(axis)
        indexes = self._grid.indexes(axis, self._grid.legal).astype(np.int16)
        if axis in self._grid.applies:
            indexes[~self.applies(axis)] = ABSENT
        return indexes

    def __iter__(self) -> Iterator[str]:
        """The axes, in the order of the space."""
        return iter(self._grid.axes)

    def __len__(self) -> int:
        """How many axes."""
        return len(self._grid.axes)

    def applies(self, axis: str) -> NDArray[np.bool_]:
        """(candidates,): where the axis changes anything, so that the config has a value of it."""
        cells = self._grid.legal
        if axis not in self._grid.applies:
            return np.ones(cells.shape, dtype=np.bool_)
        where = np.broadcast_to(self._grid.applies[axis], self._grid.verdicts.shape)
        return where.reshape(-1)[cells]

    def kinds(self, axes: Iterable[str]) -> NDArray[np.int64]:
        """(candidates,): numbers that are equal exactly where the values of all of these axes are."""
        found = np.zeros(self._grid.legal.shape, np.int64)
        for axis in axes:
            found = found * (len(self._grid.axes[axis]) + 1) + self[axis] + 1
        return found

    def used(self, axis: str) -> list[int]:
        """The indexes that occur in the axis' column, ascending but `ABSENT` last."""
        column = self[axis]
        counts = np.bincount(np.where(column == ABSENT, len(self._grid.axes[axis]), column))
        occurring = np.flatnonzero(counts).tolist()
        return [ABSENT if at == len(self._grid.axes[axis]) else at for at in occurring]


class Candidates(Sequence[TrialConfig]):
    """Every legal config of a space, made when it is asked for, in the order of the file.

    Iterating over all of them takes some 20 microseconds each; `columns` answers questions about all of them at once.
    """

    def __init__(
        self, grid: Grid, make_config: MakeConfig, values_of: Callable[[TrialConfig], Mapping[str, Scalar]]
    ) -> None:
        self._grid = grid
        self._make_config = make_config
        self._values_of = values_of
        self.columns = Columns(grid)
        self._places: dict[TrialConfig, int | None] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._grid.legal)

    @overload
    def __getitem__(self, index: int) -> TrialConfig: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TrialConfig, ...]: ...
    def __getitem__(self, index: int | slice) -> TrialConfig | tuple[TrialConfig, ...]:
        """One candidate, or several."""
        if isinstance(index, slice):
            return tuple(self._config(cell) for cell in self._grid.legal[index].tolist())
        return self._config(int(self._grid.legal[index]))

    def __iter__(self) -> Iterator[TrialConfig]:
        """Each candidate."""
        return (self._config(int(cell)) for cell in self._grid.legal)

    def __contains__(self, config: object) -> bool:
        """Whether it is one of them."""
        return isinstance(config, TrialConfig) and self._find(config) is not None

    def index(self, config: TrialConfig, start: int = 0, stop: int | None = None) -> int:
        """Where a config stands, and its figures in the columns, found without a look at the others.

        Raises:
            ValueError: it is none of the candidates from `start` to `stop`.
        """
        at = self._find(config)
        if at is None or at not in range(len(self))[start:stop]:
            raise ValueError(f"{config} is not among the candidates")
        return at

    def _find(self, config: TrialConfig) -> int | None:
        """Where a config stands, None where it is none of them; remembered, since a study asks often for its trials."""
        if config not in self._places:
            self._places[config] = self._looked_up(config)
        return self._places[config]

    def _looked_up(self, config: TrialConfig) -> int | None:
        cell = self._grid.cell(self._values_of(config))
        at = int(np.searchsorted(self._grid.legal, np.int32(cell)))
        found = at < len(self) and self._grid.legal[at] == cell and self._config(cell) == config
        return at if found else None

    def _config(self, cell: int) -> TrialConfig:
        return self._make_config(self._grid.values(cell))
