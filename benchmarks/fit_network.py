"""Where the constants of `autotune/predict/network.py` come from.

    python benchmarks/fit_network.py --data DIR

DIR has `aic_nccl_latency.csv` (ms, sizes in values; ai-dynamo/aiconfigurator) for the links in a node and
`nccl_multinode_h100.csv` (microseconds, bytes; smol-training-playbook) for the cards between nodes. A fifth is held
out.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Values = NDArray[np.float64]

LINKS = {"a100_sxm": 300e9, "h100_sxm": 450e9, "h200_sxm": 450e9, "b200_sxm": 900e9}
CARD, LINK, ON_NODE = 50e9, 450e9, 8
RAMP_BYTES = 32 * 2**20
SMALLEST = 2**18


def fit(title: str, names: tuple[str, ...], start: list[float], formula: Callable[..., Values], data: Values) -> None:
    """Fit `formula(constants, *columns)` to the last column, and print constants and held-out errors."""
    held = np.asarray(np.random.default_rng(0).random(data.shape[1]) < 0.2)

    def errors(logs: Values) -> Values:
        return np.asarray(np.log(formula(np.exp(logs), *data[:-1, ~held]) / data[-1, ~held]))

    found = np.exp(least_squares(errors, np.log(start), loss="soft_l1", f_scale=0.1).x)
    error = formula(found, *data[:-1, held]) / data[-1, held] - 1
    print(title, {name: float(f"{value:.3g}") for name, value in zip(names, found, strict=True)})
    print(f"  held out: n {held.sum()}, median {np.median(abs(error)):.3f}, p90 {np.quantile(abs(error), 0.9):.3f}")


def in_node(path: Path) -> None:
    """Rings over the links."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["nccl_dtype"] == "half" and row["framework"] == "TRTLLM"]
    for operations, twice in ((("all_reduce",), 2), (("all_gather", "reduce_scatter"), 1)):
        data = np.array(
            [
                (int(row["num_gpus"]), 2 * int(row["message_size"]), LINKS[row["system"]], float(row["latency"]) / 1e3)
                for row in rows
                if row["op_name"] in operations and 2 * int(row["message_size"]) >= SMALLEST
            ]
        ).T

        def formula(found: Values, k: Values, size: Values, link: Values, twice: int = twice) -> Values:
            start, step, share = found
            return np.asarray(start + twice * (k - 1) * step + twice * (k - 1) / k * size / (share * link))

        fit(f"in a node: {', '.join(operations)}", ("start", "step", "share"), [6e-6, 1e-6, 0.6], formula, data)


def between_nodes(path: Path) -> None:
    """Trees over the cards, and single messages."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "latency" and int(row["nodes"]) > 1]

    def columns(collective: str, smallest: int, most_nodes: int) -> Values:
        return np.array(
            [
                (int(row["nodes"]), int(row["message_bytes"]), float(row["value"]) / 1e6)
                for row in rows
                if row["collective"] == collective
                and int(row["message_bytes"]) >= smallest
                and int(row["nodes"]) <= most_nodes
            ]
        ).T

    def tree(found: Values, g: Values, size: Values) -> Values:
        start, level, share, ramp = found
        between = (g - 1) / g / ON_NODE / CARD
        inside = (ON_NODE * g - 1) / (ON_NODE * g) * size / (0.95 * LINK)  # NVLink SHARP, which these nodes have
        slow = between * np.minimum(size, RAMP_BYTES) / ramp
        return np.asarray(start + np.log2(g) * level + 2 * np.maximum(inside, between * size / share) + 2 * slow)

    def send(found: Values, _nodes: Values, size: Values) -> Values:
        start, share = found
        return np.asarray(start + size / (share * CARD))

    names = ("start", "level", "card share", "ramp share")
    fit("between nodes: all_reduce", names, [2e-5, 6e-5, 0.6, 0.4], tree, columns("all_reduce", 2**16, 16))
    fit("between nodes: send", ("step", "card share"), [4e-5, 0.8], send, columns("sendrecv", 1, 7))


def main() -> None:
    """Fit both levels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the published tables")
    folder = parser.parse_args().data
    in_node(folder / "aic_nccl_latency.csv")
    between_nodes(folder / "nccl_multinode_h100.csv")


if __name__ == "__main__":
    main()
