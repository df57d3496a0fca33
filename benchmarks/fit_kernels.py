"""Where the constants of `autotune/predict/kernels.py` and of issuing work in `step.py` come from.

    python benchmarks/fit_kernels.py --data DIR

DIR has `aic_gemm_bf16_latency.csv`: latencies (ms) of matrix products from ai-dynamo/aiconfigurator. Four fifths of the
rows with both outer sides of at least 64 are fitted, with a loss that odd rows cannot bend; the rest is scored. Then a
Qwen3 of 8 and of 24 layers with tensors too small to count runs on this machine's processor: what a layer more takes to
issue, forward, backward, and recomputed. Only their ratios are used.
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares
from transformers import Qwen3Config, Qwen3ForCausalLM

from autotune.spec.cluster import find_gpu

Values = NDArray[np.float64]

SYSTEMS = {"a100_sxm": "A100-80GB", "h100_sxm": "H100-80GB", "h200_sxm": "H200-141GB"}
SMALLEST = 64
LAYERS = (8, 24)
REPEATS = 100


def seconds(logs: Values, sides: Values, peak: float, bandwidth: float) -> Values:
    """The formula of `kernels.py`; `logs` of its t0, p, e and u."""
    start, pad, efficiency, memory = np.exp(logs)
    m, n, k = sides
    arithmetic = 2 * (m + pad) * (n + pad) * (k + pad) / (peak * efficiency)
    return np.asarray(start + np.maximum(arithmetic, 2 * (m * n + m * k + k * n) / (bandwidth * memory)))


def fit_matmul(path: Path) -> None:
    """Print the constants of each GPU and their errors on rows that were held out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chance = np.random.default_rng(0)
    for system, name in SYSTEMS.items():
        gpu = find_gpu(name)
        peak, bandwidth = gpu.peak_flops_per_second["bf16"], gpu.memory_bandwidth_bytes_per_second or 0.0
        chosen = [row for row in rows if row["system"] == system and min(int(row["m"]), int(row["n"])) >= SMALLEST]
        sides = np.array([[float(row[side]) for row in chosen] for side in "mnk"])
        measured = np.array([float(row["latency"]) for row in chosen]) / 1e3
        held = chance.random(len(chosen)) < 0.2

        def errors(
            logs: Values,
            sides: Values = sides[:, ~held],
            measured: Values = measured[~held],
            peak: float = peak,
            bandwidth: float = bandwidth,
        ) -> Values:
            return np.log(seconds(logs, sides, peak, bandwidth) / measured)

        start = np.log([5e-6, 60, 0.8, 0.8])
        found = least_squares(errors, start, loss="soft_l1", f_scale=0.1).x
        print(name, dict(zip(("t0", "p", "e", "u"), np.exp(found).round(7).tolist(), strict=True)))
        for smallest in (0, 1e10, 1e11):
            scored = held & (2 * sides.prod(axis=0) >= smallest)
            error = seconds(found, sides[:, scored], peak, bandwidth) / measured[scored] - 1
            print(
                f"  held out, from {smallest:.0e} FLOP: n {scored.sum()}, median {np.median(abs(error)):.3f},"
                f" p90 {np.quantile(abs(error), 0.9):.3f}, bias {np.median(error):+.3f}"
            )


def measure_issue() -> None:
    """Print the least seconds that one more layer takes, and what recomputing it adds."""
    torch.set_num_threads(1)
    ahead, both = _issue(checkpointing=None)
    print(f"one layer issued: forward {ahead:.2e} s, backward {both - ahead:.2e} s, {(both - ahead) / ahead:.2f} times")
    for reentrant in (True, False):
        again = _issue(checkpointing={"use_reentrant": reentrant})[1] - both
        print(f"recomputed, reentrant {reentrant}: {again:.2e} s more, {again / ahead:.2f} forward passes")


def _issue(checkpointing: dict[str, bool] | None) -> tuple[float, float]:
    """Seconds a layer, of the forward pass and of both."""
    few, many = ([_least(run) for run in _passes(layers, checkpointing)] for layers in LAYERS)
    ahead, both = ((more - less) / (LAYERS[1] - LAYERS[0]) for less, more in zip(few, many, strict=True))
    return ahead, both


def _passes(layers: int, checkpointing: dict[str, bool] | None) -> tuple[Callable[[], object], Callable[[], object]]:
    config = Qwen3Config(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        vocab_size=32,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    tokens = torch.zeros((1, 4), dtype=torch.long)

    def forward() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    return forward, lambda: forward().backward()  # type: ignore[no-untyped-call]  # torch's own


def _least(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Fit and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the published table")
    fit_matmul(parser.parse_args().data / "aic_gemm_bf16_latency.csv")
    measure_issue()


if __name__ == "__main__":
    main()
