"""However sequences of different lengths are batched, the loss and its gradients are those of the sequences alone."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from autotune.engines.batches import MicroBatch, collated, inputs, sequence
from autotune.engines.engine import Engine, build_engine
from autotune.engines.pytorch import PyTorchEngine
from autotune.spec.config import Batching
from autotune.spec.request import TrialRequest
from tests.engines.flex_on_cpu import flex_on_cpu
from tests.engines.parity import CPU, SEQUENCE_LENGTH, VOCAB, WORKLOAD, Ranks, request

LENGTHS = (5, SEQUENCE_LENGTH, 11)
ASCENDING = tuple(sorted(LENGTHS))
SEQUENCES = [torch.from_numpy(sequence(3, 0, index, length, VOCAB)) for index, length in enumerate(LENGTHS)]
BATCHINGS: tuple[Batching, ...] = ("padded", "dynamic_padding", "packed")


def trial(engine: str = "pytorch", **fields: Any) -> TrialRequest:
    found = request(engine, fields.pop("zero_stage", 0), micro_batch_size=3, gpus=1, **fields)
    return dataclasses.replace(found, workload=dataclasses.replace(WORKLOAD, global_batch_size=3, lengths=ASCENDING))


def loss_and_gradients(engine: PyTorchEngine, batch: MicroBatch) -> tuple[float, torch.Tensor]:
    engine.optimizer.zero_grad()
    loss = engine.forward(batch.input_ids, boundary=True, **batch.more)
    engine.backward(loss, boundary=True)
    return loss.item(), torch.cat([parameter.grad.reshape(-1) for parameter in engine._parameters])  # type: ignore[union-attr] # all have one


@pytest.fixture(scope="module")
def apart() -> tuple[float, torch.Tensor]:
    """The mean over the predicted tokens of the sequences, each passed alone."""
    engine = PyTorchEngine(trial(), CPU)
    losses, gradients = 0.0, torch.zeros(())
    predicted = sum(LENGTHS) - len(LENGTHS)
    for ids in SEQUENCES:
        loss, gradient = loss_and_gradients(engine, MicroBatch(ids[None], len(ids)))
        losses += loss * (len(ids) - 1) / predicted
        gradients = gradients + gradient * (len(ids) - 1) / predicted
    return losses, gradients


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_the_loss_is_that_of_the_sequences_alone(
    apart: tuple[float, torch.Tensor], batching: Batching, attention: str
) -> None:
    engine = PyTorchEngine(trial(attention=attention, batching=batching), CPU)
    with flex_on_cpu():
        loss, gradients = loss_and_gradients(engine, collated(SEQUENCES, batching, SEQUENCE_LENGTH))
    assert loss == pytest.approx(apart[0], rel=1e-5)
    torch.testing.assert_close(gradients, apart[1], rtol=1e-4, atol=1e-6)


def test_sequences_that_see_each_other_are_found(apart: tuple[float, torch.Tensor]) -> None:
    batch = collated(SEQUENCES, "packed", SEQUENCE_LENGTH)
    one = batch.more | {"position_ids": torch.arange(sum(LENGTHS))[None]}
    loss, _ = loss_and_gradients(PyTorchEngine(trial(), CPU), dataclasses.replace(batch, more=one))
    assert loss != pytest.approx(apart[0], rel=1e-4)


def test_a_flash_kernel_is_told_where_sequences_end() -> None:
    """By transformers, from the positions; the kernel itself needs a GPU."""
    positions = collated(SEQUENCES, "packed", SEQUENCE_LENGTH).more["position_ids"]
    assert _is_packed_sequence(positions, 1)
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
    assert ends.tolist() == [0, 5, 5 + SEQUENCE_LENGTH, sum(LENGTHS)]
    assert int(longest) == SEQUENCE_LENGTH


@pytest.mark.parametrize(
    ("batching", "shape"),
    [("padded", (3, SEQUENCE_LENGTH)), ("dynamic_padding", (3, 11)), ("packed", (1, 5 + 11 + 9))],
)
def test_shapes_and_tokens(batching: Batching, shape: tuple[int, int]) -> None:
    found = collated([SEQUENCES[0], SEQUENCES[2], SEQUENCES[1][:9]], batching, SEQUENCE_LENGTH)
    assert found.input_ids.shape == shape
    assert found.tokens == 5 + 11 + 9
    assert all(tensor.shape == shape for tensor in found.more.values())


@pytest.mark.parametrize("batching", BATCHINGS)
def test_every_split_has_the_same_sequences(batching: Batching) -> None:
    whole, half = trial(batching=batching), trial(batching=batching)
    workload = dataclasses.replace(WORKLOAD, global_batch_size=8, lengths=ASCENDING)

    def tokens(micro_batch_size: int, gpus: int) -> list[int]:
        config = dataclasses.replace(whole.config, micro_batch_size=micro_batch_size, gpus=gpus)
        found: list[int] = []
        for micro_step in range(workload.micro_steps(config)):
            for rank in range(gpus):
                batch = inputs(config, workload, VOCAB, step=2, micro_step=micro_step, rank=rank)
                mask = batch.more.get("attention_mask", torch.ones_like(batch.input_ids))
                found += batch.input_ids[mask.bool()].tolist()
        return found

    assert tokens(8, 1) == tokens(1, 1) == tokens(2, 4)
    longest = inputs(half.config, half.workload, VOCAB, step=0, micro_step=0, rank=0, longest=True)
    assert longest.tokens == 3 * SEQUENCE_LENGTH - (batching != "packed")  # else there were no mask
    assert tuple(longest.input_ids.shape) == half.workload.largest_shape(half.config)


def mean_loss(rank: int, trial: TrialRequest) -> float:
    engine: Engine = build_engine(trial, CPU)
    batch = inputs(trial.config, trial.workload, VOCAB, step=0, micro_step=0, rank=rank)
    loss = engine.forward(batch.input_ids, boundary=True, **batch.more)
    engine.backward(loss, boundary=True)
    engine.update()
    assert engine.evaluate(batch.input_ids, **batch.more).item() < loss.item()
    return loss.item()


@pytest.mark.parametrize(
    ("engine", "zero_stage"), [pytest.param("deepspeed", 2, marks=pytest.mark.slow), ("pytorch", 3)]
)
def test_sharded_engines_take_the_same_inputs(ranks: Ranks, engine: str, zero_stage: int) -> None:
    def losses(batching: Batching) -> list[float]:
        found = trial(engine, zero_stage=zero_stage, batching=batching)
        split = dataclasses.replace(
            found,
            config=dataclasses.replace(found.config, gpus=2),
            workload=dataclasses.replace(found.workload, global_batch_size=6, learning_rate=1e-3),
        )
        return ranks.run(mean_loss, split)

    padded = losses("padded")
    assert losses("packed") == pytest.approx(padded, rel=1e-4)
