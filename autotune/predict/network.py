"""How long collectives take on two levels of network: links inside a node, cards between nodes.

A group of k ranks spans g nodes with r = k/g ranks on each; each rank has a link into its node of bandwidth L and a
share N of the node's cards. For B bytes, the whole tensor:

    all-gather, reduce-scatter   s + (k - g)·a + (g - 1)·A + T(B)        a ring: every hop once
    all-reduce                   s + 2·(k - 1)·a + 2·T(B)                in one node: a ring, every hop twice
                                 S + log2(g)·D + 2·T(B)                  over several: trees between the nodes
    send                         s + B/(l·L), or A + B/(d·N)
    T(B) = max((k - 1)/k·B / (l·L), (g - 1)/g·B / (r·c·N)) + (g - 1)/g·min(B, 32 MiB) / (r·w·N)

The last term: below 32 MiB, messages are cut so small that cards do not reach their bandwidth.

The steps are those of NCCL's own estimate (src/graph/tuning.cc), the constants fitted by `benchmarks/fit_network.py` on
2026-11-24. In a node: tables of ai-dynamo/aiconfigurator (Apache-2.0), A100 to B200, 2 to 8 GPUs; the median error on
rows held out is 11 % for all-reduce and 17 % for the others. Between nodes only H100 nodes with 8 x 400 Gb/s of EFA
were found (smol-training-playbook, CC-BY-4.0, 2 to 16 nodes): 9 % for all-reduce, 17 % for single messages. There are
no tables of all-gather between nodes: A is the time of a small message. Other networks are taken to have the same
latencies and to reach the same shares.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.errors import UnknownHardwareError
from autotune.predict.kernels import Values
from autotune.spec.cluster import GpuSpec

Counts = NDArray[np.int64]

_NODE_START = 10e-6  # s
_NODE_STEP = 1e-6  # a
_LINK_SHARE = 0.60  # l: 0.65 for all-reduce, 0.56 for the others
_CARD_STEP = 52e-6  # A
_TREE_START = 15e-6  # S
_TREE_LEVEL = 75e-6  # D
_CARD_SHARE = 0.66  # c
_SEND_SHARE = 0.51  # d
_RAMP_SHARE = 0.36  # w
_RAMP_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that communicate, one group a candidate."""

    size: Counts
    """k."""
    nodes: Counts
    """g."""


def group(size: Counts, stride: Counts, gpus_per_node: int) -> Group:
    """Ranks `stride` apart, `size` of them, where neighbours in rank fill one node after the other."""
    near = np.clip(gpus_per_node // stride, 1, size)
    return Group(size, -(-size // near))


@dataclass(frozen=True, slots=True)
class Network:
    """The network of one kind of GPU."""

    link: float
    """L, bytes a second."""
    card: float
    """N, bytes a second."""

    def all_gather(self, ranks: Group, size: Values) -> Values:
        """Seconds until each rank has all `size` bytes; a reduce-scatter of as many takes as long."""
        steps = (ranks.size - ranks.nodes) * _NODE_STEP + (ranks.nodes - 1) * _CARD_STEP
        return np.where(ranks.size > 1, _NODE_START + steps + self._transfer(ranks, size), 0.0)

    def all_reduce(self, ranks: Group, size: Values) -> Values:
        """Seconds until each rank has the sum of all ranks' `size` bytes."""
        near = _NODE_START + 2 * (ranks.size - 1) * _NODE_STEP
        far = _TREE_START + np.log2(ranks.nodes) * _TREE_LEVEL
        seconds = np.where(ranks.nodes > 1, far, near) + 2 * self._transfer(ranks, size)
        return np.where(ranks.size > 1, seconds, 0.0)

    def send(self, size: Values, *, far: NDArray[np.bool_]) -> Values:
        """Seconds for `size` bytes from one GPU to another, of another node where `far`."""
        near = _NODE_START + size / (_LINK_SHARE * self.link)
        return np.where(far, _CARD_STEP + size / (_SEND_SHARE * self.card), near)

    def _transfer(self, ranks: Group, size: Values) -> Values:
        inside = (ranks.size - 1) / ranks.size * size / (_LINK_SHARE * self.link)
        between = (ranks.nodes - 1) / ranks.size / self.card  # (g - 1)/g / (r·N)
        ramp = between * np.minimum(size, _RAMP_BYTES) / _RAMP_SHARE
        return np.maximum(inside, between * size / _CARD_SHARE) + ramp


def network(gpu: GpuSpec) -> Network:
    """The network that the table of GPUs describes.

    Raises:
        UnknownHardwareError: it gives no bandwidth.
    """
    link, card = gpu.intra_node_bandwidth_bytes_per_second, gpu.inter_node_bandwidth_bytes_per_second
    if link is None or card is None:
        raise UnknownHardwareError(f"GPU {gpu.name}: its network is not known; use another GPU of the table")
    return Network(link, card)


_PCIE_GEN4 = ("A100-40GB", "A100-80GB", "L40S-48GB", "RTX-4090-24GB")
_PCIE_GEN5 = ("H100-80GB", "H200-141GB", "H20-96GB", "B200-180GB", "MI300X-192GB")
_PCIE_SHARE = 0.8
"""Of 2 GB/s (generation 4) or 4 GB/s (5) a lane, after packet headers. Judgement."""


def host_link(gpu: GpuSpec) -> float:
    """Bytes a second between one GPU and pinned host memory, over 16 lanes of the PCIe generation on its datasheet.

    Raises:
        UnknownHardwareError: the generation is not known.
    """
    for names, bandwidth in ((_PCIE_GEN4, 32e9), (_PCIE_GEN5, 64e9)):
        if gpu.name in names:
            return _PCIE_SHARE * bandwidth
    raise UnknownHardwareError(f"GPU {gpu.name}: its link to the host is not known; use another GPU of the table")
