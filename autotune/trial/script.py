"""A rank that has the user's own training script do its work: it starts the command, listens, and says how it ended.

The script's process meets this one at a Unix socket in a folder that only this user can enter
(`autotune.script.session` is the other end). There it is told the trial, and says what a rank of ours says: its
progress, then what it measured or why it failed. What it does not say, its exit code and its log tell.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path

from autotune.formats.script import FILES, files, fill, names, values, with_accumulation
from autotune.spec.outcome import FailureKind, Phase, RankFailure, RankMeasurement
from autotune.spec.request import TrialRequest
from autotune.spec.script import ScriptRun
from autotune.trial.child import SCRIPT_VARIABLE, Progress, Reporter, Seat, script_socket
from autotune.trial.failure import ReportedFailureError, memory_kind_of_log
from autotune.trial.gang import log_end, log_tail
from autotune.trial.host_memory import oom_kills

LAST_WORDS_SECONDS = 1.0
"""How long after a process has ended what it said before may arrive, or after it has hung up its end."""

EXIT_SECONDS = 4.0
"""How long a script that has measured enough may take to leave; less than `autotune.trial.gang.EXIT_SECONDS`."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

_ended: Connection | None = None
"""Tells the exit code of the command that this process, which runs one rank of one trial, has started."""


def run_script(seat: Seat, request: TrialRequest, script: ScriptRun, reporter: Reporter) -> RankMeasurement:
    """Run the script as one rank of a trial, or wait for what a launcher starts as that rank.

    Args:
        seat: where the rank sits; RANK, MASTER_ADDR and the like are in the environment already.
        request: the trial.
        script: its script.
        reporter: is told of each phase that the script reports.

    Raises:
        ReportedFailureError: the script failed, or ended before everything was measured.
        OSError: it could not be started.
    """
    global _ended
    reporter.enter_stage("build", Phase.BUILD)
    killed_before = oom_kills()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(script_socket(seat.scratch, seat.local_rank))
        listener.listen(1)
        _ended = _start(seat, request, script) if script.launch == "rank" or seat.local_rank == 0 else None
        channel, code = _await_script(listener, _ended)
    said: RankMeasurement | RankFailure | int | None = code
    if channel is not None:
        channel.send((seat, request))
        said = _listen(channel, _ended, reporter)
    if isinstance(said, RankMeasurement):
        return said
    if not isinstance(said, RankFailure):
        said = _bury(said, seat, reporter.phase, oom_kills_before=killed_before)
    raise ReportedFailureError(said)


def await_exit() -> None:
    """Let a script that has measured enough end by itself, as it is about to; the gang kills what is left."""
    if _ended is not None:
        _ended.poll(EXIT_SECONDS)


def _await_script(listener: socket.socket, ended: Connection | None) -> tuple[Connection | None, int | None]:
    """The channel to the script, or the exit code of a command that ended before there was one."""
    ready = wait([listener] if ended is None else [listener, ended])
    if listener in ready:
        return Connection(listener.accept()[0].detach()), None
    assert ended is not None  # nothing else was waited for
    return None, ended.recv()


def _listen(
    channel: Connection, ended: Connection | None, reporter: Reporter
) -> RankMeasurement | RankFailure | int | None:
    """What the script says in the end, else its command's exit code, or None where another rank has started it."""
    while True:
        ready = wait([channel] if ended is None else [channel, ended])
        if channel not in ready and not channel.poll(LAST_WORDS_SECONDS):
            assert ended is not None  # nothing else was waited for
            return int(ended.recv())
        try:
            message = channel.recv()
        except (EOFError, OSError):
            return int(ended.recv()) if ended is not None and ended.poll(LAST_WORDS_SECONDS) else None
        if not isinstance(message, Progress):
            found: RankMeasurement | RankFailure = message
            return found
        reporter.relay(message)


def _start(seat: Seat, request: TrialRequest, script: ScriptRun) -> Connection:
    """Start the command; the connection tells its exit code."""
    work = with_accumulation(request.workload, request.config, request.accumulation)
    nodes = seat.world_size // seat.local_world_size
    output = Path(seat.scratch) / "output"
    output.mkdir(exist_ok=True)
    found = {
        **values(request.config, work),
        "nodes": str(nodes),
        "node_rank": str(seat.rank // seat.local_world_size),
        "gpus_per_node": str(seat.local_world_size),
        "master_address": seat.master_address,
        "master_port": str(seat.master_port),
        "model": script.model,
        "output": str(output),
    }
    folder = Path(seat.log_path).with_suffix("")
    folder.mkdir(exist_ok=True)
    named = names([*script.command, *(value for _, value in script.environment)])
    for name, text in files(named, request.config, work, nodes, request.device).items():
        path = folder / FILES[name].name
        path.write_text(text, encoding="utf-8")
        found[name] = str(path)
    command = [fill(word, found) for word in script.command]
    print("autotune:", *command, flush=True)  # noqa: T201 the rank's log
    process = subprocess.Popen(
        command,
        cwd=script.folder,
        env=_environment(seat, script, found),
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_the_rank,
    )
    receiver, sender = multiprocessing.Pipe(duplex=False)
    threading.Thread(target=lambda: sender.send(process.wait()), name="script-watch", daemon=True).start()
    return receiver


def _environment(seat: Seat, script: ScriptRun, found: Mapping[str, str]) -> dict[str, str]:
    """The rank's own, with this Python first, and Autotune where the script's `import` finds it."""
    variables = dict(os.environ)
    if script.launch == "node":  # the launcher gives each rank its own
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            variables.pop(name, None)
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
    variables[SCRIPT_VARIABLE] = seat.scratch
    return variables | {name: fill(value, found) for name, value in script.environment}


def _die_with_the_rank() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _bury(code: int | None, seat: Seat, phase: Phase, *, oom_kills_before: int | None) -> RankFailure:
    """Why a script ended that did not say it."""
    lines = log_end(seat.log_path)
    kind = (memory_kind_of_log(lines) if code else None) or FailureKind.CRASH
    if (oom_kills() or 0) > (oom_kills_before or 0) and oom_kills_before is not None:
        kind = FailureKind.HOST_OUT_OF_MEMORY
        ending = "was killed by the kernel because the host's memory ran out"
    elif code is None:
        ending = "ended without a word"
    elif code < 0:
        ending = f"was killed by {signal.Signals(-code).name}"
    elif code == 0:
        ending = (
            "ended before enough was measured; it must train on, and have autotune.TrainerCallback or call"
            " autotune.report_step after each step"
        )
    else:
        ending = f"exited with code {code}"
    message = "\n".join([f"the script of rank {seat.rank} {ending}", *(log_tail(lines) if code else ())])
    return RankFailure(rank=seat.rank, kind=kind, phase=phase, message=message)
