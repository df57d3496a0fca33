"""Traces the step of one structure: the engine's own, of a shallow model and on fake tensors."""

import functools
import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.modeling_layers import GradientCheckpointingLayer

from autotune.modeling.build import layer_kinds
from autotune.modeling.device_map import balanced_map, layers_of_gpus, shortened
from autotune.modeling.stage import LOSS_CHUNKS
from autotune.predict.fake import fake_trial
from autotune.predict.memory import layers_of_rank
from autotune.predict.record import Recorder
from autotune.predict.reserved import Event, deep_step_of, fragmentation, step_of
from autotune.predict.segments import (
    CHECKED_BATCH,
    CHECKED_LENGTH,
    TRACED_BATCH,
    TRACED_LAYERS,
    TRACED_LENGTH,
    StructureError,
    Trace,
)
from autotune.predict.stream import SitedStream, Stream
from autotune.predict.structure import MAX_WHOLE_LAYERS, Structure
from autotune.predict.zero import all_at_once, first_depth, largest_double_bytes
from autotune.spec.config import MLP_TILES, Attention, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.outcome import Phase
from autotune.spec.prediction import Part
from autotune.spec.request import TrialRequest
from autotune.spec.workload import Workload


class Inspectable(Protocol):
    """What both engines tell of themselves besides running steps."""

    def living_tensors(self) -> dict[str, list[torch.Tensor]]:
        """What lives between passes, by `Part`."""


def trace_stream(
    model: ModelSpec, config: TrialConfig, *, accumulates: bool, rank: int = 0, batches: int = 0
) -> Stream | SitedStream:
    """Trace what `config` does with `model`, whatever its micro-batch size and sequence length.

    Args:
        model: the architecture.
        config: its micro-batch size and sequence length play no part.
        accumulates: an optimizer step has more than one micro-batch.
        rank: whose step it is; of GPUs of one process, `memory.roles`.
        batches: micro-batches that go through a pipeline, `traced_batches`; without one it plays no part.

    Raises:
        UsageError: the engine refuses the config.
    """
    if config.pipeline_parallel_size > 1:
        return replace(_trace_pipeline(model, config, batches, rank), pieces=pieces(config))
    if config.device_map == "auto":
        return _trace_spread(model, config, accumulates=accumulates, role=rank)
    traced = _trace_layers(model, config, accumulates=accumulates, rank=rank)
    return replace(traced, pieces=pieces(config))


def _trace_layers(model: ModelSpec, config: TrialConfig, *, accumulates: bool, rank: int) -> Stream | SitedStream:
    depth = model.num_hidden_layers

    def record(layers: int, batch: int, length: int) -> Trace:
        return record_trace(
            model,
            config,
            layers,
            batch,
            length,
            accumulates=accumulates,
            rank=rank,
            double_bytes=None if layers == depth else double_bytes,
        )

    double_bytes = largest_double_bytes(model, config)
    if depth <= MAX_WHOLE_LAYERS:
        return _whole(record(depth, TRACED_BATCH, TRACED_LENGTH))
    config, update_share = all_at_once(model, config)
    period = _period(json.dumps(model.config, sort_keys=True), config.attention)
    # FSDP2 works on a layer at a time; without replicas there are no buckets either.
    alone = config.model_parallel_size > 1 and config.replicas == 1
    by_layer = config.engine == "pytorch" and (config.zero_stage > 0 or alone)
    shallow = None
    if by_layer and period == 1:
        shallow = record(TRACED_LAYERS, TRACED_BATCH, TRACED_LENGTH)
        deeper = record(TRACED_LAYERS + 1, CHECKED_BATCH, CHECKED_LENGTH)
        try:
            repeated = Structure.fit(shallow, deeper).stream(depth)
        except StructureError:
            pass
        else:
            return replace(repeated, fragmentation=fragmentation(_deep_step(shallow, deeper, depth)))
    # Depths that hold whole periods and the same rest differ by whole periods: the line in depth is then theirs.
    period = math.lcm(period, config.selective_every or 1)
    low = first_depth(model, config)
    low += (depth - low) % period
    high = low + period * math.ceil((2 if config.zero_stage == 3 else 4) / period)
    if high >= depth:
        return _whole(record(depth, TRACED_BATCH, TRACED_LENGTH))
    if shallow is None or low != TRACED_LAYERS:
        shallow = record(low, TRACED_BATCH, TRACED_LENGTH)
    deep = record(high, TRACED_BATCH, TRACED_LENGTH)
    carried = SitedStream.between(shallow, deep, depth, update_share)
    return replace(carried, fragmentation=fragmentation(step_of(deep, update_share)))


def _trace_pipeline(model: ModelSpec, config: TrialConfig, batches: int, rank: int) -> Stream | SitedStream:
    """Micro-batches in flight mix forward and backward passes, so each operator's line in depth is taken, as for DDP.

    Depth counts layers of this rank: where stages are uneven, the model is taken to be as deep as if all were like it.
    """
    depth, stages = model.num_hidden_layers, config.pipeline_stages

    def record(layers: int) -> Trace:
        return record_trace(
            model, config, layers, TRACED_BATCH, TRACED_LENGTH, accumulates=True, rank=rank, batches=batches
        )

    low, high = 2 * stages, 4 * stages
    if depth <= max(MAX_WHOLE_LAYERS, high):
        return _whole(record(depth))
    layers = layers_of_rank(config, depth, rank * config.pipeline_parallel_size // config.gpus)
    deep = record(high)
    carried = SitedStream.between(record(low), deep, round(layers * config.pipeline_parallel_size))
    return replace(carried, fragmentation=fragmentation(step_of(deep)))


def _trace_spread(model: ModelSpec, config: TrialConfig, *, accumulates: bool, role: int) -> Stream | SitedStream:
    """What one GPU of the process holds. Depth counts its layers: what is on others is in their memory."""
    placed = balanced_map(model, config)
    depth = model.num_hidden_layers
    layers = layers_of_gpus(placed, depth, config.gpus)
    gpu = _gpu_of_role(role, placed, layers)
    period = math.lcm(_period(json.dumps(model.config, sort_keys=True), config.attention), config.selective_every or 1)
    start = sum(layers[:gpu])

    def record(count: int) -> Trace:
        # As many before it as keep the kind of its first layer.
        short, whole = shortened(placed, gpu, count, (start - 1) % period + 1)
        trace = record_trace(
            model,
            config,
            whole,
            TRACED_BATCH,
            TRACED_LENGTH,
            accumulates=accumulates,
            spread=(short, gpu),
        )
        return replace(trace, layers=count)

    low = TRACED_LAYERS + (layers[gpu] - TRACED_LAYERS) % period
    high = low + period * math.ceil(4 / period)
    if high >= layers[gpu]:
        found: Stream | SitedStream = _whole(record(layers[gpu]))
    else:
        deep = record(high)
        carried = SitedStream.between(record(low), deep, layers[gpu])
        found = replace(carried, fragmentation=fragmentation(step_of(deep)))
    return replace(found, gpu=gpu, layers=np.array(layers, np.int64))


def _gpu_of_role(role: int, placed: Mapping[str, int], layers: Sequence[int]) -> int:
    """See `autotune.predict.memory.roles`; without a GPU between, the last."""
    used = sorted(set(placed.values()))
    if role == 0:
        return used[0]
    return max(used[1:-1], key=lambda gpu: layers[gpu]) if role == 1 and len(used) > 2 else used[-1]


def pieces(config: TrialConfig) -> int:
    """Into how many a config cuts a sequence."""
    ranks = config.sequence_parallel_size
    if config.engine == "pytorch":  # between the matrices that are shared
        ranks *= config.tensor_parallel_size
    chunks = LOSS_CHUNKS if config.loss == "chunked" else 1
    return ranks * math.lcm(chunks, MLP_TILES if config.tiled_mlp else 1)


def _deep_step(shallow: Trace, deeper: Trace, layers: int) -> list[Event]:
    try:
        return deep_step_of(shallow, deeper, layers)
    except StructureError:  # live bytes repeat, blocks do not: the traced depth has to do, as where layers differ
        return step_of(deeper)


def _whole(trace: Trace) -> Stream:
    return replace(Stream.of(trace), fragmentation=fragmentation(step_of(trace)))


def record_trace(
    model: ModelSpec,
    config: TrialConfig,
    layers: int,
    micro_batch_size: int,
    sequence_length: int,
    *,
    accumulates: bool,
    rank: int = 0,
    double_bytes: int | None = None,
    batches: int = 0,
    spread: tuple[Mapping[str, int], int] | None = None,
) -> Trace:
    """Run the step at one size and write down what it allocates. `sequence_length` is that of a piece, see `pieces`.

    The trace has one optimizer step, the first, which makes what later steps find: optimizer states, and buffers that
    are kept. Those are standing bytes here, and their making is left out.
    """
    pipelined = config.pipeline_parallel_size > 1
    steps = batches if pipelined else 2 if accumulates else 1
    plan = [True] if pipelined else [False] * (steps - 1) + [True]
    config = replace(config, micro_batch_size=micro_batch_size, sequence_length=sequence_length * pieces(config))
    request = TrialRequest(
        trial_id="trace",
        model=ModelSpec(name=model.name, config=_shallow(model.config, layers)),
        workload=Workload(global_batch_size=micro_batch_size * config.data_parallel_size * steps),
        config=config,
        device="cpu",
    )
    # AutoTP gathers logits, unless the head is the embedding.
    whole_logits = config.engine == "deepspeed" and not model.config.get("tie_word_embeddings")
    shared_vocabulary = model.vocab_size // (1 if whole_logits else config.tensor_parallel_size)
    placed, gpu = (None, None) if spread is None else spread
    recorder = Recorder(shared_vocabulary, update_on_host=config.offload != "none", double_bytes=double_bytes, gpu=gpu)
    with (
        _no_collection(),
        fake_trial(request, recorder, rank, placed) as trial,
        _Marks(recorder, layers, each=not pipelined, compiled=config.torch_compile) as marks,
    ):
        engine: Any = trial.engine
        if config.engine == "deepspeed" and config.zero_stage == 3:
            # The first step only learns the order of the modules; from the second on parameters are prefetched.
            trial.run([True])
        gc.collect()
        standing = recorder.begin(_by_part(engine))
        for boundary in plan:
            trial.run([boundary], _naming(engine, recorder, marks.on_phase))
            recorder.name_all(_by_part(engine))
        lasting, segments, blocks = recorder.end()
    for part, size in lasting.items():
        standing[part] = standing.get(part, 0) + size
    return Trace(layers, micro_batch_size, sequence_length, standing, segments, blocks)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage in cycles goes when a trace says so, not by chance; and what is there already is not looked through."""
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


class _Marks:
    """Tells the recorder where layers begin and end.

    By PyTorch's hooks on all modules, which come before those of FSDP2 and ZeRO; torch.compile would take them into its
    graphs, so that compiled layers are marked around their call.

    Args:
        recorder: is told.
        layers: how many there are.
        each: False for no layers, only passes and the update.
        compiled: whether layers are compiled.
    """

    def __init__(self, recorder: Recorder, layers: int, *, each: bool, compiled: bool) -> None:
        self._each = each
        self._compiled = compiled
        self._recorder = recorder
        self._last = layers - 1
        self._layers: dict[int, int] = {}  # id of a module -> its number
        self._micro_step = -1
        self._phase = Phase.START

    def __enter__(self) -> "_Marks":
        self._stack = ExitStack()
        if self._each and self._compiled:
            self._mark_calls()
        elif self._each:
            for handle in (
                register_module_forward_pre_hook(self._before_forward),
                register_module_forward_hook(self._after_forward),
            ):
                self._stack.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _mark_calls(self) -> None:
        layer: Any = GradientCheckpointingLayer
        call = layer.__call__

        def marked(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._before_forward(module, args)
            output = call(module, *args, **kwargs)
            self._after_forward(module, args, output)
            return output

        layer.__call__ = marked
        self._stack.callback(setattr, layer, "__call__", call)

    def on_phase(self, phase: Phase) -> None:
        """The trial enters a phase."""
        self._phase = phase
        if phase is Phase.OPTIMIZER:
            self._recorder.enter(self._micro_step, "update")
        if phase is Phase.FORWARD:
            self._micro_step += 1
            self._recorder.enter(self._micro_step, "before")

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        # In the backward pass layers run again where activations are checkpointed.
        if self._phase is not Phase.FORWARD or not isinstance(module, GradientCheckpointingLayer):
            return
        layer = self._layers.setdefault(id(module), len(self._layers))
        self._recorder.enter(self._micro_step, "forward", layer)
        if layer == 0:
            self._when_gradient(args[0], "after", 0)

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._phase is not Phase.FORWARD or not isinstance(module, GradientCheckpointingLayer):
            return
        layer = self._layers[id(module)]
        self._when_gradient(output[0] if isinstance(output, tuple) else output, "backward", layer)
        if layer == self._last:
            self._recorder.enter(self._micro_step, "between")

    def _when_gradient(self, tensor: torch.Tensor, kind: Any, layer: int) -> None:
        if not tensor.requires_grad:  # of frozen embeddings: the backward pass ends with the first layer
            return
        tensor.register_hook(lambda _: self._recorder.enter(self._micro_step, kind, layer))  # type: ignore[no-untyped-call]


def _naming(engine: Inspectable, recorder: Recorder, on_phase: Callable[[Phase], None]) -> Callable[[Phase], None]:
    """Gradients can be recognised between the backward pass and the update that clears them."""

    def told(phase: Phase) -> None:
        if phase is Phase.OPTIMIZER:
            recorder.name_all(_by_part(engine))
        on_phase(phase)

    return told


@functools.lru_cache
def _period(model: str, attention: Attention) -> int:
    """After how many layers of a model, its config as JSON, their kinds repeat; all of them where they never do."""
    kinds = layer_kinds(ModelSpec(name="traced", config=json.loads(model)), attention)
    return next(period for period in range(1, len(kinds) + 1) if kinds[period:] == kinds[:-period])


def _by_part(engine: Inspectable) -> dict[Part, list[torch.Tensor]]:
    return {Part(name): tensors for name, tensors in engine.living_tensors().items()}


def _shallow(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of the same model with fewer layers; what it lists per layer becomes shorter too."""
    depth = config["num_hidden_layers"]
    cut = {key: value[:layers] for key, value in config.items() if isinstance(value, list) and len(value) == depth}
    return {**config, **cut, "num_hidden_layers": layers}
