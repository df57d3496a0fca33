"""Counts the operators of a structure: the engine's own step on fake tensors, at two micro-batch sizes."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from autotune.predict.fake import FakeTrial, fake_trial
from autotune.predict.operators import PHASES, Operators, Phase, Row, Work
from autotune.spec.adapters import trainable_parameters
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.outcome import Phase as TrialPhase
from autotune.spec.request import TrialRequest
from autotune.spec.workload import Workload

BATCHES = (2, 4)
"""Micro-batch sizes between which sizes are lines. Not 1, whose tensors have layouts of their own."""
WHOLE_LAYERS = 6
"""Up to so many the model is counted as it is; deeper ones are a line through two depths."""
DEPTHS = (2, 3)
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20
"""Of DDP: torch/nn/parallel/distributed.py, `_DEFAULT_FIRST_BUCKET_BYTES` and `bucket_cap_mb`."""

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_COLLECTIVES = {
    "allreduce": Work.ALL_REDUCE,
    "allgather": Work.ALL_GATHER,
    "_allgather": Work.ALL_GATHER,
    "reduce_scatter": Work.REDUCE_SCATTER,
    "_reduce_scatter": Work.REDUCE_SCATTER,
    "broadcast": Work.BROADCAST,
}
_WITHOUT_DATA = ("empty", "new_empty", "empty_like", "empty_strided", "resize_", "_unsafe_view", "_reshape_alias")
_ASKED_BY_FAKES = (torch.ops.prim.device.default,)
"""Dispatched for fake tensors alone."""

_Seen = tuple[Work, str, float, Work]
"""Kind, dtype and size of one operator, and which kind of call it is."""


def count_operators(model: ModelSpec, config: TrialConfig) -> Operators:
    """The operators of a step, whatever the micro-batch size.

    Args:
        model: the architecture. Layers of models deeper than `WHOLE_LAYERS` are taken to be like their first ones.
        config: its micro-batch size plays no part.

    Raises:
        UsageError: the engine refuses the config.
    """
    if config.optimizer == "adamw_torch_8bit":  # compiled: nothing is dispatched that could be counted
        config = replace(config, optimizer="adamw")
    depth = model.num_hidden_layers
    if depth <= WHOLE_LAYERS:
        return Operators(tuple(_rows(_count(model, config, depth))))
    low, high = (_count(model, config, layers) for layers in DEPTHS)
    # A buffer of the whole model has one size at each depth, and so a negative count at the lower one.
    counted = {key: low[key] + (high[key] - low[key]) * (depth - DEPTHS[0]) for key in low.keys() | high.keys()}
    return Operators(tuple(_rows({key: count for key, count in counted.items() if count})))


_Key = tuple[Phase, Work, str, float, float]


def _rows(counted: dict[_Key, int]) -> Iterator[Row]:
    low, high = BATCHES
    for (phase, work, dtype, small, large), count in sorted(counted.items()):
        slope = (large - small) / (high - low)
        yield Row(phase, work, dtype, small - slope * low, slope, float(count))


def _count(model: ModelSpec, config: TrialConfig, layers: int) -> Counter[_Key]:
    """How often each operator occurs, by its sizes at the two micro-batch sizes."""
    depth = model.config["num_hidden_layers"]
    cut = {
        key: value[:layers] for key, value in model.config.items() if isinstance(value, list) and len(value) == depth
    }
    shallow = ModelSpec(name=model.name, config={**model.config, **cut, "num_hidden_layers": layers})
    request = TrialRequest(
        trial_id="count",
        model=shallow,
        workload=Workload(global_batch_size=2 * BATCHES[0] * config.data_parallel_size),
        config=replace(config, micro_batch_size=BATCHES[0]),
        device="cpu",
    )
    observer = _Observer()
    with fake_trial(request, observer) as trial:
        trial.run([True])  # makes optimizer states, and ZeRO-3 learns the order of modules
        steps = []
        for batch in BATCHES:
            sized = FakeTrial(trial.engine, replace(request, config=replace(config, micro_batch_size=batch)))
            steps.append(observer.step(sized))
    counted: Counter[_Key] = Counter()
    for phase in PHASES:
        small, large = (step[phase] for step in steps)
        if len(small) != len(large):  # an operator more or less at another size: sizes at the smaller one
            large = small
        for (work, dtype, size, call), (_, _, larger, _) in zip(small, large, strict=True):
            counted[phase, call, "other", 0.0, 0.0] += 1
            if work is not call:
                counted[phase, work, dtype, size, larger] += 1
    if config.engine == "pytorch" and config.zero_stage == 0 and config.gpus > 1:
        # The fake step's reducer has a hook in place of collectives.
        for size in _buckets(4 * trainable_parameters(shallow, config)):
            counted["last_micro_step", Work.ALL_REDUCE, "fp32", size, size] += 1
    return counted


def _buckets(size: int) -> list[float]:
    first = min(size, FIRST_BUCKET_BYTES)
    pieces = math.ceil((size - first) / BUCKET_BYTES)
    return [float(first), *[(size - first) / pieces] * pieces]


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what is dispatched while it is told to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: list[_Seen] | None = None

    def step(self, trial: FakeTrial) -> dict[Phase, list[_Seen]]:
        """One optimizer step of two micro-steps."""
        found: dict[Phase, list[_Seen]] = {phase: [] for phase in PHASES}

        def enter(phase: TrialPhase) -> None:
            if phase is TrialPhase.OPTIMIZER:
                self._seen = found["update"]

        self._seen = found["micro_step"]
        trial.run([False])
        self._seen = found["last_micro_step"]
        trial.run([True], enter)
        self._seen = None
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._seen is not None and func not in _ASKED_BY_FAKES:
            self._seen.append(_seen(func, args, kwargs or {}, result))
        return result


def _seen(func: Any, args: Any, kwargs: Any, result: Any) -> _Seen:
    sharded = any(isinstance(leaf, DTensor) for leaf in tree_iter((args, kwargs)))
    call = Work.SHARDED_CALL if sharded else Work.CALL
    work, dtype, size = _work(func, args, kwargs, result) or (call, "other", 0.0)
    return work, dtype, size, call


def _work(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[Work, str, float] | None:
    """Kind, dtype and size of what works on data."""
    name, results = func._schema.name.partition("::")[2], _tensors(result)
    inputs = _tensors((args, kwargs))
    if func.namespace == "c10d":
        work = next((work for start, work in _COLLECTIVES.items() if name.startswith(start)), None)
        # Outputs and inputs: the whole tensor is the larger side.
        return None if work is None else (work, "bytes", float(max(map(_bytes, map(_tensors, args[:2])))))
    if func._overloadpacket in flop_registry:
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return Work.PRODUCT, _dtype(results), float(flops)
    if "scaled_dot_product" in name:
        backward = "backward" in name
        batch, heads, queries, width = args[1 if backward else 0].shape
        keys = args[2 if backward else 1].shape[-2]
        # Two products forward; five backward, one of which recomputes the scores.
        flops = (10 if backward else 4) * batch * heads * queries * keys * width
        return Work.ATTENTION_BACKWARD if backward else Work.ATTENTION, _dtype(results), float(flops)
    if func.is_view or name in _WITHOUT_DATA or not inputs:
        return None
    return Work.MOVED, _dtype(results or inputs), float(_bytes(inputs) + _bytes(results))


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Those in a tree; of DTensors what this rank has."""
    leaves = (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
    return [leaf._local_tensor if isinstance(leaf, DTensor) else leaf for leaf in leaves]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _dtype(tensors: list[torch.Tensor]) -> str:
    return next((_DTYPES[tensor.dtype] for tensor in tensors if tensor.dtype in _DTYPES), "other")
