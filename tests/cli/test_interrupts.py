"""Interruptions that are swallowed on their way come again; those that come through come once."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time
from autotune.cli import interrupts

interrupts.AGAIN_SECONDS = 0.2


class Swallows:
    def __del__(self):
        os.kill(os.getpid(), {number})
        time.sleep(0)  # Python raises here, prints it and goes on


before = signal.getsignal(signal.SIGTERM)
try:
    with interrupts.insistent_interrupts():
        if {swallowed}:
            Swallows()
        else:
            os.kill(os.getpid(), {number})
        print("goes on", flush=True)
        time.sleep(20)
        print("never", flush=True)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("came through", signal.getsignal(signal.SIGTERM) is before)
"""


@pytest.mark.parametrize(
    ("swallowed", "said"), [(True, ["goes on", "came through True"]), (False, ["came through True"])]
)
@pytest.mark.parametrize("number", ["signal.SIGINT", "signal.SIGTERM"])
def test_it_is_raised_until_it_leaves_the_block(number: str, swallowed: bool, said: list[str]) -> None:
    script = SCRIPT.format(number=number, swallowed=swallowed)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout.splitlines()) == (0, said), ran.stderr
    assert ("KeyboardInterrupt" in ran.stderr) == swallowed  # what Python prints of it
