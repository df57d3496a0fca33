"""One rank of the self-benchmark: times products, attention, memory, collectives and the dispatch of operators.

All ranks work at once, on one thread each, as the ranks of a trial on a CPU do. Each figure is the median of a few
rounds, each of which is repeated until it takes long enough to time. Work is timed by the seconds that it has a core,
so that a busy machine is not taken for a slow one; where ranks outnumber cores, each has its share of one. Collectives
wait for each other, and are timed by the clock on the wall.
"""

import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.modeling.build import build_model
from autotune.modeling.memory_tracker import MemoryTracker
from autotune.predict.machine import Curve, MachineRates
from autotune.spec.model import ModelSpec

ROUNDS = 3
ROUND_SECONDS = 0.03
"""At least; long enough for the ranks to disturb each other as they do in a step."""
PRODUCT_SIDES = (32, 96, 256, 512, 1024)
ATTENTION_LENGTHS = (64, 256, 512)
MOVED_VALUES = (2**10, 2**14, 2**17, 2**20, 2**22)
COLLECTIVE_BYTES = (2**10, 2**14, 2**17, 2**20, 2**23)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LAYERS = 4
_TINY = ModelSpec(
    name="self-benchmark",
    config={
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 16,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
)
"""Tensors too small to count: its steps are dispatch alone."""


def run_rank(rank: int, ranks: int, dtypes: tuple[str, ...], meeting: str) -> MachineRates:
    """Measure, together with the other ranks.

    Args:
        rank: of this process.
        ranks: of all.
        dtypes: that products, attention and memory are timed in.
        meeting: a file through which the ranks find each other; it does not exist yet.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    try:
        call, sharded = _calls()
        work: dict[str, dict[str, Curve]] = {
            "product": {dtype: _products(_DTYPES[dtype]) for dtype in dtypes},
            "attention": {},
            "attention_backward": {},
            "moved": {dtype: _moved(_DTYPES[dtype]) for dtype in dtypes},
        }
        for dtype in dtypes:
            work["attention"][dtype], work["attention_backward"][dtype] = _attention(_DTYPES[dtype])
        return MachineRates(call_seconds=call, sharded_call_seconds=sharded, work=work | _collectives(ranks))
    finally:
        dist.destroy_process_group()


def _seconds(run: Callable[[], object], *, together: bool = False) -> float:
    """Median seconds of one run. With `together`, all ranks run as often, and wait for each other."""
    clock, ranks_of_core = time.perf_counter, 1.0
    if not together:
        clock = time.thread_time
        ranks_of_core = max(1.0, dist.get_world_size() / len(os.sched_getaffinity(0)))
    run()
    began = clock()
    run()
    often = max(1, round(ROUND_SECONDS / max(clock() - began, 1e-7)))
    if together:
        agreed = torch.tensor([often])
        dist.broadcast(agreed, 0)
        often = int(agreed.item())
    rounds = []
    for _ in range(ROUNDS):
        dist.barrier()
        began = clock()
        for _ in range(often):
            run()
        rounds.append((clock() - began) / often)
    return ranks_of_core * statistics.median(rounds)


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _calls() -> tuple[float, float]:
    """Seconds to dispatch one operator of a decoder, and one of DTensors, while memory is counted."""
    model = build_model(_TINY, "sdpa")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()
    tokens = torch.zeros((1, 4), dtype=torch.long)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = distribute_tensor(torch.zeros(8 * dist.get_world_size()), mesh, [Shard(0)])
    step()
    with _Count() as count:
        step()
    with MemoryTracker():
        return _seconds(step) / count.calls, _seconds(lambda: shard.mul(1.5))


def _products(dtype: torch.dtype) -> Curve:
    found = []
    for side in PRODUCT_SIDES:
        left, right = torch.ones((side, side), dtype=dtype), torch.ones((side, side), dtype=dtype)
        out = torch.empty_like(left)
        found.append((2.0 * side**3, _seconds(partial(torch.mm, left, right, out=out))))
    return tuple(found)


def _attention(dtype: torch.dtype) -> tuple[Curve, Curve]:
    """Causal attention of 4 heads of 32 values: forward, and backward."""
    forward, backward = [], []
    for length in ATTENTION_LENGTHS:
        query = torch.randn((2, 4, length, 32), dtype=dtype, requires_grad=True)

        def attend(query: torch.Tensor = query) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)

        def both(query: torch.Tensor = query) -> None:
            attend(query).sum().backward()  # type: ignore[no-untyped-call]

        with torch.no_grad():
            ahead = _seconds(attend)
        square = 8 * length**2 * 32
        forward.append((4.0 * square, ahead))
        backward.append((10.0 * square, max(_seconds(both) - ahead, 0.1 * ahead)))
    return tuple(forward), tuple(backward)


def _moved(dtype: torch.dtype) -> Curve:
    """The mean of a sum, a product, an activation and a cast, by the bytes that a sum moves."""
    found = []
    for values in MOVED_VALUES:
        left, right = torch.ones(values, dtype=dtype), torch.ones(values, dtype=dtype)
        other = torch.float32 if dtype is not torch.float32 else torch.bfloat16

        def run(left: torch.Tensor = left, right: torch.Tensor = right, other: torch.dtype = other) -> None:
            _ = left + right
            _ = left * right
            _ = torch.nn.functional.silu(left)
            _ = left.to(other)

        size = left.element_size()
        moved = 3 * size + 3 * size + 2 * size + size + torch.empty(0, dtype=other).element_size()
        found.append((moved * values / 4, _seconds(run) / 4))
    return tuple(found)


def _collectives(ranks: int) -> dict[str, dict[str, Curve]]:
    found: dict[str, list[tuple[float, float]]] = {
        "all_reduce": [], "all_gather": [], "reduce_scatter": [], "broadcast": [],
    }  # fmt: skip
    for size in COLLECTIVE_BYTES:
        whole, part = torch.ones(size // 4 // ranks * ranks), torch.ones(size // 4 // ranks)
        runs: dict[str, Callable[[], object]] = {
            "all_reduce": partial(dist.all_reduce, whole),
            "all_gather": partial(dist.all_gather_into_tensor, whole, part),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole),
            "broadcast": partial(dist.broadcast, whole, 0),
        }
        for name, run in runs.items():
            found[name].append((float(size), _seconds(run, together=True)))
    return {name: {"bytes": tuple(curve)} for name, curve in found.items()}
