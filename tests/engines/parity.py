"""What every engine is held against: a plain loop over the same model and batch, and ranks that run the engines."""

import datetime
import functools
import importlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import distributed
from torch.nn import functional
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.engines.batches import micro_batch, sequence
from autotune.engines.engine import Engine
from autotune.modeling.build import build_model, materialize
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.request import TrialRequest
from autotune.spec.workload import Workload

CPU = torch.device("cpu")
STEPS = 4
SEQUENCE_LENGTH = 16
VOCAB = 256
# A learning rate at which four steps move the loss well beyond the tolerance; clipping is active in each of them.
WORKLOAD = Workload(global_batch_size=8, learning_rate=2e-3, max_gradient_norm=1.0)
# DeepSpeed's own buckets are 1-2 GiB of live tensors, whatever the size of the model.
SMALL_BUCKETS = tuple(
    (f"zero_optimization.{key}", 20_000)
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
)


@dataclass(frozen=True)
class Trace:
    """Mean loss of the global batch, and gradient norm before clipping, of each optimizer step."""

    losses: list[float]
    norms: list[float]


def tiny(tied: bool = False) -> ModelSpec:
    return ModelSpec(
        name="tiny-qwen3",
        config={
            "model_type": "qwen3",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": VOCAB,
            "max_position_embeddings": 128,
            "tie_word_embeddings": tied,
        },
    )


def request(
    engine: str, zero_stage: int, tied: bool = False, model: ModelSpec | None = None, **fields: Any
) -> TrialRequest:
    """A trial of two ranks, unless `gpus` says how many."""
    config = TrialConfig.from_dict(
        {
            "engine": engine,
            "zero_stage": zero_stage,
            "gpus": 2,
            "micro_batch_size": 2,
            "sequence_length": SEQUENCE_LENGTH,
            "precision": "fp32",
            "deepspeed": dict(SMALL_BUCKETS) if engine == "deepspeed" else {},
            **fields,
        }
    )
    return TrialRequest(trial_id="parity", model=model or tiny(tied), workload=WORKLOAD, config=config, device="cpu")


# ---- the reference


@functools.cache
def plain_training(spec: ModelSpec) -> Trace:
    """One process, the whole global batch in one pass, nothing from the engines."""
    torch.set_num_threads(1)
    model = build_model(spec, "eager")
    materialize(model, CPU, torch.float32, WORKLOAD.seed)
    return plain_steps(model, WORKLOAD.learning_rate)


def plain_steps(model: torch.nn.Module, rate: float, adam: Callable[..., torch.optim.Optimizer] = AdamW) -> Trace:
    """Train what of a model is to be trained, by a loop that has nothing from the engines."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adam(parameters, lr=rate, weight_decay=0.0)
    trace = Trace([], [])
    for step in range(STEPS):
        ids = torch.stack(
            [
                torch.from_numpy(sequence(WORKLOAD.seed, step, index, SEQUENCE_LENGTH, VOCAB))
                for index in range(WORKLOAD.global_batch_size)
            ]
        )
        logits = model(input_ids=ids).logits
        loss = functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has not annotated it
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.stack([(gradient**2).sum() for gradient in gradients]).sum().sqrt()
        for gradient in gradients:
            gradient.mul_(min(1.0, WORKLOAD.max_gradient_norm / norm.item()))
        optimizer.step()
        optimizer.zero_grad()
        trace.losses.append(loss.item())
        trace.norms.append(norm.item())
    return trace


# ---- the ranks


def train(rank: int, trial: TrialRequest, build: Callable[[TrialRequest, torch.device], Engine]) -> Trace:
    return optimizer_steps(rank, trial, build(trial, CPU))


def optimizer_steps(rank: int, trial: TrialRequest, engine: Engine) -> Trace:
    trace = Trace([], [])
    micro_steps = trial.workload.micro_steps(trial.config)
    for step in range(STEPS):
        mean = torch.zeros(())
        for micro_step in range(micro_steps):
            ids = micro_batch(trial.config, trial.workload, VOCAB, step=step, micro_step=micro_step, rank=rank)
            boundary = micro_step == micro_steps - 1
            loss = engine.forward(ids, boundary=boundary)
            engine.backward(loss, boundary=boundary)
            mean += loss.detach() / (micro_steps * distributed.get_world_size())
        engine.update()
        distributed.all_reduce(mean)
        trace.losses.append(mean.item())
        trace.norms.append(engine.gradient_norm())
    # Of a collective's result that nobody waits for torch keeps the memory, step after step.
    assert torch._C._distributed_c10d._get_work_registry_size() == 0
    return trace


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__ has no annotations
    """`elements` of the largest tensor that an operator returned, of those that `counts`."""

    def __init__(self, counts: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor has its __init__
        self.counts = counts
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and self.counts(result):
            self.elements = max(self.elements, result.numel())
        return result


class RankServer:
    """A process that has imported what ranks need, and forks them for each call, as a trial's pool does.

    Gloo's threads outlive their groups wherever something still names them, as caches of meshes do. Some hundred that
    poll in ranks that served many calls took all of the machine's time.

    Args:
        preload: modules that ranks find imported besides those of a trial's.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        modules = ("autotune.trial.preload", "autotune.engines.layout", "autotune.engines.pipeline", "peft", *preload)
        self._process = context.Process(target=serve, args=(theirs, modules))
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("DS_ACCELERATOR", "cpu")
            environment.setenv("OMP_NUM_THREADS", "1")
            self._process.start()
        theirs.close()

    def call(self, count: int, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> list[Any]:
        self._connection.send((count, function, arguments, seconds))
        answers = self._connection.recv()
        for rank, (failed, result) in enumerate(answers):
            assert not failed, f"rank {rank}: {result}"
        return [result for _, result in answers]

    def stop(self) -> None:
        self._connection.send(None)
        self._process.join(20)
        self._process.kill()


@dataclass(frozen=True)
class Ranks:
    """Processes of one gloo group that call a function together."""

    server: RankServer
    count: int

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
        return self.server.call(self.count, function, arguments, seconds)


def few(cases: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """All cases, as parameters of a test; those marked slow that are not among the default ones."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if case in default else pytest.mark.slow)
        for case in cases
    ]


def serve(connection: Connection, modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    context = multiprocessing.get_context("fork")
    for count, function, arguments, seconds in iter(connection.recv, None):
        with tempfile.TemporaryDirectory() as folder:
            ranks = []
            for rank in range(count):
                answer, theirs = context.Pipe(duplex=False)
                group = (rank, count, Path(folder) / "store")
                process = context.Process(target=answer_call, args=(theirs, group, function, arguments))
                process.start()
                theirs.close()  # so that an end without an answer is seen
                ranks.append((process, answer))
            deadline = time.monotonic() + seconds
            answers = [answer_of(answer, deadline) for _, answer in ranks]
            for process, _ in ranks:
                process.kill()
                process.join()
        connection.send(answers)


def answer_of(connection: Connection, deadline: float) -> tuple[bool, Any]:
    """Whether a rank has failed, and its result or what happened."""
    try:
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            return True, "it hangs"
        answer: tuple[bool, Any] = connection.recv()
        return answer
    except EOFError:
        return True, "it ended without an answer"


def answer_call(
    connection: Connection, group: tuple[int, int, Path], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    rank, count, store = group
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(seconds=60),
        )
        result = function(rank, *arguments)
        distributed.barrier()  # a peer must not see connections close while it needs them
        connection.send((False, result))
    except Exception:  # whatever it is, the process of the tests reports it
        connection.send((True, traceback.format_exc()))


def assert_equal(trace: Trace, reference: Trace, *, loss_rtol: float = 1e-4, norm_rtol: float = 1e-4) -> None:
    assert trace.losses == pytest.approx(reference.losses, rel=loss_rtol)
    assert trace.norms == pytest.approx(reference.norms, rel=norm_rtol)
