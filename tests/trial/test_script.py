"""A user's own script as a trial: it is measured, its failures are told apart, and nothing of it is left."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from autotune.spec.outcome import FailureKind
from autotune.spec.request import TrialRequest
from autotune.spec.script import ScriptRun
from autotune.spec.workload import LongRunSettings
from autotune.trial.pool import GangResult, NodePool
from tests.trial.gangs import ROOT, a_request, run

COMMAND = ("python", "tests/trial/plain_script.py", "{mode}", "{width}", "{micro_batch_size}")
MIB = 1 << 20
SQUARES = 4 * (64 * 64 + 64) * 4
"""Bytes of the plain script's parameters at width 64."""


def request(mode: str = "fine", width: int = 64, gpus: int = 2, **changes: Any) -> TrialRequest:
    script = ScriptRun(command=(*COMMAND, "{gradient_accumulation_steps}"), folder=ROOT)
    found = a_request(f"script-{mode}", script=script, memory_limit_bytes=8 * MIB)
    config = dataclasses.replace(found.config, gpus=gpus, script=(("mode", mode), ("width", width)))
    return dataclasses.replace(found, config=config, **changes)


def whole(request: TrialRequest) -> TrialRequest:
    assert request.script is not None
    return dataclasses.replace(request, script=dataclasses.replace(request.script, accumulation="whole"))


def failed(result: GangResult) -> tuple[FailureKind, str]:
    assert result.failure is not None, result
    return result.failure.kind, result.failure.message


def test_it_is_measured_as_our_engines_are(faulty: NodePool) -> None:
    result = run(faulty, request())
    assert result.failure is None, result.failure
    for rank in result.ranks:
        # 3 of the step's 4 micro-steps suffice: one step warms up, two are measured.
        assert (len(rank.micro_step_seconds), len(rank.update_step_seconds), len(rank.losses)) == (4, 2, 9)
        assert (rank.micro_step_tokens, rank.update_step_tokens) == ((), (14, 14))
        assert list(rank.phase_seconds) == ["start", "build", "measure"]
        # Weights, gradients, two states of Adam, and little else.
        assert 4 * SQUARES < rank.peak_memory_allocated_bytes < 6 * SQUARES
        assert rank.device_memory_bytes == 8 * MIB
    log = Path(result.log_path or "").read_text()
    assert "plain_script.py fine 64 2 3" in log


@pytest.mark.slow
def test_whole_steps_and_a_long_run(faulty: NodePool) -> None:
    (rank,) = run(faulty, whole(request("whole", gpus=1))).ranks
    assert (len(rank.micro_step_seconds), len(rank.update_step_seconds)) == (0, 6)
    (rank,) = run(faulty, request(gpus=1, long_run=LongRunSettings(steps=2, save=True))).ranks
    assert rank.long_run is not None
    assert len(rank.long_run.step_seconds) == len(rank.long_run.step_tokens) == 2
    assert rank.long_run.allocated_bytes[0] >= 3 * SQUARES
    assert rank.long_run.checkpoint_skipped == "the script saves its own"
    assert len(rank.losses) == 4 * 8  # with the true accumulation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("build", FailureKind.INVALID_CONFIG, "ValueError: no such layer"),
        ("silent", FailureKind.CRASH, "ended before enough was measured"),
        ("crash", FailureKind.CRASH, "RuntimeError: the data is broken"),
        ("nan", FailureKind.NON_FINITE_LOSS, "the loss is nan in optimizer step 1"),
        ("caught", FailureKind.OUT_OF_MEMORY, "exited with code 1"),
        ("whole", FailureKind.INVALID_CONFIG, "has reported 1 micro-steps of an optimizer step in all"),
    ],
)
def test_failures_are_told_apart(faulty: NodePool, mode: str, kind: FailureKind, words: str) -> None:
    found, message = failed(run(faulty, request(mode, gpus=1)))
    assert found is kind
    assert words in message


@pytest.mark.slow
def test_memory_is_limited(faulty: NodePool) -> None:
    result = run(faulty, request(width=512))
    found, message = failed(result)
    assert found is FailureKind.OUT_OF_MEMORY
    assert "with a limit of 8388608 bytes" in message
    assert result.failure is not None
    assert result.failure.requested_bytes


@pytest.mark.slow
def test_a_hang_is_ended_and_its_stacks_are_written(faulty: NodePool) -> None:
    began = time.monotonic()
    result = run(faulty, request("hang", gpus=1, stall_seconds=1.0))
    assert failed(result)[0] is FailureKind.HANG
    assert time.monotonic() - began < 40
    assert "plain_script.py" in Path(result.log_path or "").read_text()


@pytest.mark.slow
def test_a_launcher_starts_the_ranks_and_what_they_start_ends_with_them(faulty: NodePool) -> None:
    command = ("torchrun", "--nnodes", "{nodes}", "--nproc-per-node", "{gpus_per_node}", "--master-port")
    script = ScriptRun(
        command=(*command, "{master_port}", *COMMAND[1:], "{gradient_accumulation_steps}"), folder=ROOT, launch="node"
    )
    result = run(faulty, dataclasses.replace(request("offspring"), script=script))
    assert result.failure is None, result.failure
    assert [rank.rank for rank in result.ranks] == [0, 1]


def test_the_command_is_missing(faulty: NodePool) -> None:
    script = ScriptRun(command=("no-such-launcher",), folder=ROOT)
    found, message = failed(run(faulty, dataclasses.replace(request(gpus=1), script=script)))
    assert found is FailureKind.CRASH
    assert "no-such-launcher" in message
