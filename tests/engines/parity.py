"""What every engine is held against: a plain loop over the same model and batch, and ranks that run the engines."""

import contextlib
import datetime
import functools
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import distributed
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn import functional
from torch.optim import AdamW

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


class Ranks:
    """Processes of one gloo group that call functions together."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.rendezvous = tempfile.TemporaryDirectory()
        self.connections, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, count, self.rendezvous.name, theirs), daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
        for connection in self.connections:
            connection.send((function, arguments))
        answers = []
        for rank, connection in enumerate(self.connections):  # all of them, or the next call would find what is left
            assert connection.poll(seconds), f"rank {rank} hangs"
            answers.append(connection.recv())
        for rank, (failed, result) in enumerate(answers):
            assert not failed, f"rank {rank}: {result}"
        return [result for _, result in answers]

    def stop(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()
        self.rendezvous.cleanup()


def serve(rank: int, count: int, folder: str, connection: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    for number, (function, arguments) in enumerate(iter(connection.recv, None)):
        try:
            with process_group(rank, count, Path(folder) / str(number)):
                result = function(rank, *arguments)
            connection.send((False, result))
        except Exception:  # whatever it is, the process of the tests reports it
            connection.send((True, traceback.format_exc()))


@contextlib.contextmanager
def process_group(rank: int, count: int, store: Path) -> Iterator[None]:
    """A group for each call: gloo has threads that poll for every group there is, in the end some hundred a rank."""
    import deepspeed.comm  # reads DS_ACCELERATOR, which ranks have and the tests' own process has not

    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        yield
        distributed.barrier()  # a peer must not see connections close while it needs them
    finally:
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]  # torch has not annotated it; it names groups
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # torch's, and what it keeps of it
        else:
            distributed.destroy_process_group()


def assert_equal(trace: Trace, reference: Trace, *, loss_rtol: float = 1e-4, norm_rtol: float = 1e-4) -> None:
    assert trace.losses == pytest.approx(reference.losses, rel=loss_rtol)
    assert trace.norms == pytest.approx(reference.norms, rel=norm_rtol)
