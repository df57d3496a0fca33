"""Live memory during a training step as a formula, for any batch and length: what a plan of many candidates asks.

Live memory after each change is a line in a few quantities (`segments.py`), and the peak is the largest of these lines.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autotune.predict.segments import PARTS, Kind, Trace, live_bytes, quantities
from autotune.spec.cluster import Device
from autotune.spec.prediction import Part

REPLAYED_BATCH = 2
REPLAYED_TOKENS = (1024, 4096, 16384)
"""Micro-batches for which fragmentation is known (`reserved.py`)."""


def _none() -> NDArray[np.float64]:
    return np.zeros(len(REPLAYED_TOKENS))


def _one_gpu() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Stream:
    """Live memory during a step, at the changes after which it may be highest."""

    live: NDArray[np.float64]
    """(changes, parts, QUANTITIES): bytes of each part."""
    fragmentation: NDArray[np.float64] = field(default_factory=_none)
    """(points,): bytes reserved beyond the peak, with each of `REPLAYED_TOKENS`."""
    pieces: int = 1
    """Into how many a sequence is cut by ranks, by the loss and by tiled MLPs. Lengths are of one piece: a tensor of a
    piece would be no multiple of a whole length."""
    gpu: int = 0
    """Whose memory it is, of a process that has several GPUs."""
    layers: NDArray[np.int64] = field(default_factory=_one_gpu)
    """(GPUs,): how many layers each of them has; empty where a process has one."""

    @classmethod
    def of(cls, trace: Trace) -> "Stream":
        """The stream of a model of just the traced depth."""
        return cls(highest_rows(np.concatenate(list(live_bytes(trace).values()))))

    def peak_bytes(
        self, micro_batch_size: NDArray[np.int64], sequence_length: NDArray[np.int64], device: Device
    ) -> NDArray[np.float64]:
        """Highest live bytes of the device (points,)."""
        values = quantities(micro_batch_size, sequence_length / self.pieces)
        peaks: NDArray[np.float64] = (values @ (self.live * counted_on(device)).sum(axis=1).T).max(axis=1)
        return peaks

    def breakdown(self, micro_batch_size: int, sequence_length: int, device: Device) -> dict[Part, int]:
        """Bytes of each part at the device's peak, of the host besides; parts without any are left out."""
        values = quantities(np.array([micro_batch_size]), np.array([sequence_length / self.pieces]))[0]
        parts = self.live @ values
        return _named(parts[(parts @ counted_on(device)[:, 0]).argmax()])


@dataclass(frozen=True, slots=True)
class SitedStream:
    """Live memory where layers do not repeat, as with buckets that fill at any place: a line in depth for each site.

    A site is an operator in a kind of segment of a micro-step. The highest live bytes at each are taken at two depths
    and carried on as a straight line; the peak is the highest of them. Unlike a `Stream`, this is an approximation.
    """

    shallow: NDArray[np.float64]
    """(rows, parts, QUANTITIES): what may be highest at each site, site by site."""
    deep: NDArray[np.float64]
    shallow_starts: NDArray[np.int64]
    """(sites,): the first row of each site in `shallow`."""
    deep_starts: NDArray[np.int64]
    steps: float
    """The model's depth beyond the shallow trace, in units of the difference between the two traces."""
    fragmentation: NDArray[np.float64] = field(default_factory=_none)
    """(points,): as a `Stream`'s, but that of the deeper trace."""
    pieces: int = 1
    """As a `Stream`'s."""
    gpu: int = 0
    """As a `Stream`'s."""
    layers: NDArray[np.int64] = field(default_factory=_one_gpu)
    """As a `Stream`'s."""

    @classmethod
    def between(cls, shallow: Trace, deep: Trace, layers: int, update_share: float = 1.0) -> "SitedStream":
        """Carry two traces of one structure on to `layers` decoder layers; see `Structure.stream`."""
        low, high = _sites(shallow, update_share), _sites(deep, update_share)
        common = [site for site in low if site in high]
        return cls(
            shallow=np.concatenate([low[site] for site in common]),
            deep=np.concatenate([high[site] for site in common]),
            shallow_starts=np.cumsum([0, *(len(low[site]) for site in common[:-1])]),
            deep_starts=np.cumsum([0, *(len(high[site]) for site in common[:-1])]),
            steps=(layers - shallow.layers) / (deep.layers - shallow.layers),
        )

    def peak_bytes(
        self, micro_batch_size: NDArray[np.int64], sequence_length: NDArray[np.int64], device: Device
    ) -> NDArray[np.float64]:
        """Highest live bytes of the device (points,)."""
        values, counted = quantities(micro_batch_size, sequence_length / self.pieces), counted_on(device)
        low = np.maximum.reduceat(values @ (self.shallow * counted).sum(axis=1).T, self.shallow_starts, axis=1)
        high = np.maximum.reduceat(values @ (self.deep * counted).sum(axis=1).T, self.deep_starts, axis=1)
        peaks: NDArray[np.float64] = (low + self.steps * (high - low)).max(axis=1)
        return peaks

    def breakdown(self, micro_batch_size: int, sequence_length: int, device: Device) -> dict[Part, int]:
        """Bytes of each part at the device's peak, of the host besides; parts without any are left out."""
        values = quantities(np.array([micro_batch_size]), np.array([sequence_length / self.pieces]))[0]
        counted = counted_on(device)[:, 0]
        low, high = self.shallow @ values, self.deep @ values
        lows = np.maximum.reduceat(low @ counted, self.shallow_starts)
        highs = np.maximum.reduceat(high @ counted, self.deep_starts)
        site = int((lows + self.steps * (highs - lows)).argmax())
        at_low = _highest_row(low, self.shallow_starts, site, counted)
        return _named(at_low + self.steps * (_highest_row(high, self.deep_starts, site, counted) - at_low))


@dataclass(frozen=True, slots=True)
class PipelineStream:
    """Live memory of a rank with more micro-batches than are traced: a line through two numbers of them.

    No more activations live the more there are, but buffers for what each receives, and what is sent, until the step
    ends.
    """

    fewer: Stream | SitedStream
    more: Stream | SitedStream
    steps: float
    """The number of micro-batches beyond the fewer, in units of the difference between the two."""

    @property
    def pieces(self) -> int:
        """As a `Stream`'s."""
        return self.more.pieces

    @property
    def fragmentation(self) -> NDArray[np.float64]:
        """(points,): as a `Stream`'s, but that of more."""
        return self.more.fragmentation

    def peak_bytes(
        self, micro_batch_size: NDArray[np.int64], sequence_length: NDArray[np.int64], device: Device
    ) -> NDArray[np.float64]:
        """Highest live bytes of the device (points,)."""
        fewer = self.fewer.peak_bytes(micro_batch_size, sequence_length, device)
        more = self.more.peak_bytes(micro_batch_size, sequence_length, device)
        return fewer + self.steps * (more - fewer)

    def breakdown(self, micro_batch_size: int, sequence_length: int, device: Device) -> dict[Part, int]:
        """Bytes of each part at the device's peak, of the host besides; parts without any are left out."""
        fewer = self.fewer.breakdown(micro_batch_size, sequence_length, device)
        more = self.more.breakdown(micro_batch_size, sequence_length, device)
        sizes = [fewer.get(part, 0) + self.steps * (more.get(part, 0) - fewer.get(part, 0)) for part in PARTS]
        return _named(np.array(sizes))


RankStream = Stream | SitedStream | PipelineStream


def fragmentation_bytes(
    stream: RankStream,
    micro_batch_size: NDArray[np.int64],
    sequence_length: NDArray[np.int64],
    device: Device,
) -> NDArray[np.float64]:
    """What the caching allocator reserves beyond the peak (points,); nothing on a CPU.

    A line between the points of the stream. Beyond the last one it grows like what depends on tokens.
    """
    tokens = micro_batch_size * sequence_length / stream.pieces
    if device == "cpu":
        return np.zeros_like(tokens)
    beyond = np.maximum(tokens / REPLAYED_TOKENS[-1], 1.0)
    size: NDArray[np.float64] = beyond * np.interp(tokens, REPLAYED_TOKENS, stream.fragmentation)
    return size


def counted_on(device: Device) -> NDArray[np.float64]:
    """(parts, 1): 1 for what is in the device's memory."""
    return np.array([[float(part is not Part.HOST or device == "cpu")] for part in PARTS])


def _named(parts: NDArray[np.float64]) -> dict[Part, int]:
    return {part: round(float(size)) for part, size in zip(PARTS, parts, strict=True) if round(float(size))}


def _sites(trace: Trace, update_share: float) -> dict[tuple[int, Kind, str], NDArray[np.float64]]:
    rows: dict[tuple[int, Kind, str], list[NDArray[np.float64]]] = {}
    for (micro_step, kind, layer), live in live_bytes(trace, update_share).items():
        for change, row in zip(trace.segments[micro_step, kind, layer], live, strict=True):
            rows.setdefault((micro_step, kind, change.operator), []).append(row)
    return {site: highest_rows(np.stack(found)) for site, found in rows.items()}


def _highest_row(
    parts: NDArray[np.float64], starts: NDArray[np.int64], site: int, counted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The row with the highest sum of one site."""
    rows = parts[starts[site] : (*starts, len(parts))[site + 1]]
    highest: NDArray[np.float64] = rows[(rows @ counted).argmax()]
    return highest


def highest_rows(live: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows of which no other is at least as large in every quantity, with and without what is on the host."""
    total = np.concatenate([(live * counted_on(device)).sum(axis=1) for device in ("cpu", "cuda")], axis=1)
    order = np.argsort(-total.sum(axis=1), kind="stable")
    kept: list[int] = []
    for row in order:
        if not kept or not (total[kept] >= total[row]).all(axis=1).any():
            kept.append(int(row))
    return live[sorted(kept)]
