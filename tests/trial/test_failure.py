import pytest
import torch
import torch.distributed as dist
from pydantic import BaseModel, ValidationError

from autotune.spec.outcome import FailureKind, Phase
from autotune.trial.failure import NonFiniteLossError, classify, describe, is_collateral, requested_bytes

CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 GiB is free."
)
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    " 4194304 bytes. Error code 12 (Cannot allocate memory)"
)
PEER_GONE = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:35421"
PEER_LATE = "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete"


def refusal() -> ValidationError:
    class Config(BaseModel):
        stage: int

    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"stage": "four"})
    return caught.value


def kind(error: BaseException, phase: Phase = Phase.FORWARD, device: str = "cuda") -> FailureKind:
    return classify(error, rank=3, phase=phase, device=device).kind  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_MESSAGE),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(CUDA_MESSAGE),
        dist.DistBackendError(
            "NCCL error in: NCCLUtils.cpp:93, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
        ),
    ],
)
def test_refused_device_memory(error: BaseException) -> None:
    assert kind(error) is FailureKind.OUT_OF_MEMORY


def test_the_c_allocator_is_the_device_on_cpu_and_the_host_on_cuda() -> None:
    assert kind(RuntimeError(CPU_MESSAGE), device="cpu") is FailureKind.OUT_OF_MEMORY
    assert kind(RuntimeError(CPU_MESSAGE), device="cuda") is FailureKind.HOST_OUT_OF_MEMORY
    assert kind(MemoryError(), device="cpu") is FailureKind.HOST_OUT_OF_MEMORY
    assert kind(OSError(12, "Cannot allocate memory"), device="cpu") is FailureKind.HOST_OUT_OF_MEMORY


def test_memory_counts_wherever_it_stands_in_the_chain_of_causes() -> None:
    try:
        try:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)
        except torch.OutOfMemoryError:
            raise RuntimeError("cannot partition the parameters")  # noqa: B904 # libraries do this
    except RuntimeError as error:
        failure = classify(error, rank=0, phase=Phase.BUILD, device="cuda")
    assert failure.kind is FailureKind.OUT_OF_MEMORY
    assert failure.requested_bytes == int(2.5 * 1024**3)


@pytest.mark.parametrize(
    "error", [refusal(), ValueError("no"), AssertionError("no"), ImportError("no"), NotImplementedError("no")]
)
def test_a_refusal_is_one_while_the_model_is_built_and_a_crash_later(error: BaseException) -> None:
    assert kind(error, Phase.BUILD) is FailureKind.INVALID_CONFIG
    assert kind(error, Phase.BACKWARD) is FailureKind.CRASH


def test_deepspeed_refuses_with_a_type_of_its_own() -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    assert kind(config.DeepSpeedConfigError("no"), Phase.BUILD) is FailureKind.INVALID_CONFIG


def test_before_the_model_is_built_the_config_is_not_to_blame() -> None:
    for error in (
        torch.OutOfMemoryError(CUDA_MESSAGE),
        torch.AcceleratorError("CUDA error: initialization error"),
        OSError(28, "No space left on device"),
        dist.DistStoreError("timed out"),
    ):
        assert kind(error, Phase.START) is FailureKind.WORKER_LOST
    assert kind(AttributeError("a bug"), Phase.START) is FailureKind.CRASH


def test_other_kinds() -> None:
    assert kind(NonFiniteLossError("nan")) is FailureKind.NON_FINITE_LOSS
    assert kind(RuntimeError(PEER_LATE)) is FailureKind.HANG
    assert kind(RuntimeError(PEER_GONE)) is FailureKind.CRASH
    assert kind(RuntimeError("CUDA error: an illegal memory access was encountered")) is FailureKind.CRASH


@pytest.mark.parametrize(
    "text",
    [
        PEER_GONE,
        PEER_LATE,
        "read: Connection reset by peer",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_collateral(text: str) -> None:
    assert is_collateral(text)


@pytest.mark.parametrize("text", [CUDA_MESSAGE, CPU_MESSAGE, "ValueError: no such stage", "was killed by SIGKILL"])
def test_not_collateral(text: str) -> None:
    assert not is_collateral(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tried to allocate 20.00 MiB. GPU 0", 20 << 20),
        ("Tried to allocate 512.00 KiB", 512 << 10),
        ("tried to allocate 4194304 bytes", 4194304),
        ("Memory limit reached in aten.add: tried to allocate 7 bytes on top of 9 live bytes", 7),
        ("no figure", None),
    ],
)
def test_requested_bytes(text: str, expected: int | None) -> None:
    assert requested_bytes(text) == expected


def test_long_messages_are_cut() -> None:
    assert len(describe(RuntimeError("x" * 10**6))) == 2000
