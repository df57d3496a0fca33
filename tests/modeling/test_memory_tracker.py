"""The tracker against torch's own profiler, byte for byte where it matters, and its limit."""

import gc
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autotune.engines.batches import micro_batch
from autotune.engines.pytorch import PyTorchEngine
from autotune.modeling.memory_tracker import MemoryTracker
from autotune.spec.config import ActivationCheckpointing, Attention, Precision, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.request import TrialRequest
from autotune.spec.workload import Workload

VOCAB = 1024
TINY = ModelSpec(
    name="tiny-qwen3",
    config={
        "model_type": "qwen3",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
)


def request_of(config: TrialConfig) -> TrialRequest:
    workload = Workload(global_batch_size=2 * config.micro_batch_size)
    return TrialRequest(trial_id="tracker", model=TINY, workload=workload, config=config, device="cpu")


def optimizer_step(engine: PyTorchEngine, request: TrialRequest) -> None:
    for micro_step in range(2):
        ids = micro_batch(request.config, request.workload, VOCAB, step=0, micro_step=micro_step, rank=0)
        loss = engine.forward(ids, boundary=micro_step == 1)
        engine.backward(loss, boundary=micro_step == 1)
    engine.update()


def peak_by_profiler(profile: torch.profiler.profile, live_before: int) -> int:
    """Highest running sum of the CPU allocator's events, in bytes."""
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = live_before
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("precision", "checkpointing", "every", "micro_batch_size", "sequence_length", "attention"),
    [
        ("fp32", "none", None, 2, 64, "sdpa"),
        ("fp32", "none", None, 4, 128, "sdpa"),
        ("fp32", "full", None, 4, 128, "sdpa"),
        ("fp32", "selective", 2, 4, 128, "sdpa"),
        ("fp32", "none", None, 2, 64, "eager"),
        ("bf16", "none", None, 2, 64, "sdpa"),
        ("bf16", "none", None, 4, 128, "sdpa"),
        ("bf16", "full", None, 4, 128, "sdpa"),
        ("bf16", "selective", 3, 4, 128, "sdpa"),
        ("bf16", "full", None, 1, 256, "sdpa"),
    ],
)
def test_peak_is_the_profilers(
    precision: Precision,
    checkpointing: ActivationCheckpointing,
    every: int | None,
    micro_batch_size: int,
    sequence_length: int,
    attention: Attention,
) -> None:
    request = request_of(
        TrialConfig(
            engine="pytorch",
            gpus=1,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            precision=precision,
            activation_checkpointing=checkpointing,
            selective_every=every,
            attention=attention,
        )
    )
    with MemoryTracker() as tracker:
        engine = PyTorchEngine(request, torch.device("cpu"))
        optimizer_step(engine, request)  # Adam's state exists from here on
        gc.collect()
        tracker.reset_peak()
        live_before = tracker.live_bytes
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer_step(engine, request)
        peak = tracker.peak_bytes
    assert peak == pytest.approx(peak_by_profiler(profile, live_before), rel=1e-3)
    assert peak > live_before


def test_counts_storages_not_tensors() -> None:
    with MemoryTracker() as tracker:
        tensor = torch.zeros(1000)
        view = tensor[10:].view(9, 110)
        assert tracker.live_bytes == 4000
        del tensor
        assert tracker.live_bytes == 4000
        del view
        assert tracker.live_bytes == 0
        assert tracker.peak_bytes == 4000


def test_counts_what_died_after_it_was_left() -> None:
    with MemoryTracker() as tracker:
        tensor = torch.zeros(1000)
    del tensor
    assert tracker.live_bytes == 0


def test_follows_resized_storages_and_restores_the_method() -> None:
    original = torch.UntypedStorage.resize_
    with MemoryTracker() as tracker:
        tensor = torch.zeros(1000)
        tensor.untyped_storage().resize_(0)
        assert tracker.live_bytes == 0
        tensor.untyped_storage().resize_(400)
        assert tracker.live_bytes == 400
    assert torch.UntypedStorage.resize_ is original


def test_rounds_up() -> None:
    with MemoryTracker(round_to=512) as tracker:
        tensors = [torch.zeros(1), torch.zeros(129)]
        assert tracker.live_bytes == 512 + 1024
    del tensors


def test_tells_sites_apart_by_phase() -> None:
    with MemoryTracker() as tracker:
        tracker.phase = "forward"
        kept = torch.zeros(100)
        tracker.phase = "backward"
        more = torch.zeros(50)
        assert tracker.sites == {("forward", "aten.zeros.default"): 400, ("backward", "aten.zeros.default"): 600}
        del more
        tracker.reset_peak()
        assert (tracker.peak_bytes, tracker.sites) == (400, {})
    del kept


def test_counts_tensors_made_before_it() -> None:
    tensor = torch.zeros(100)
    with MemoryTracker() as tracker:
        tracker.track(tensor)
        assert (tracker.live_bytes, tracker.peak_bytes) == (400, 400)


def test_counts_fake_tensors() -> None:
    with FakeTensorMode(), MemoryTracker() as tracker:
        tensor = torch.empty(10**12, device="cpu")
        assert tracker.live_bytes == tensor.untyped_storage().nbytes() == 4 * 10**12


def test_limit_refuses_and_stays_right() -> None:
    with MemoryTracker(limit_bytes=1000) as tracker:
        kept = torch.zeros(200)
        with pytest.raises(
            torch.OutOfMemoryError, match="tried to allocate 204 bytes on top of 800 live bytes"
        ) as caught:
            torch.zeros(51)
        del caught
        assert (tracker.live_bytes, tracker.peak_bytes) == (800, 800)
        exact = torch.zeros(50)
        assert tracker.live_bytes == 1000
    del kept, exact


def test_limit_at_the_peak_passes_and_one_byte_below_does_not() -> None:
    request = request_of(
        TrialConfig(engine="pytorch", gpus=1, micro_batch_size=1, sequence_length=32, precision="fp32")
    )
    with MemoryTracker() as tracker:
        engine = PyTorchEngine(request, torch.device("cpu"))
        optimizer_step(engine, request)
        gc.collect()
        tracker.reset_peak()
        optimizer_step(engine, request)
        peak = tracker.limit_bytes = tracker.peak_bytes
        optimizer_step(engine, request)
        tracker.limit_bytes = peak - 1
        with pytest.raises(torch.OutOfMemoryError) as caught:
            optimizer_step(engine, request)
        del caught
        gc.collect()
        tracker.limit_bytes = peak
        engine.update()  # drop the gradients that the failed step left
        tracker.reset_peak()
        optimizer_step(engine, request)
        assert tracker.peak_bytes == peak
