"""An interruption that is not lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

AGAIN_SECONDS = 10.0
"""After which an interruption that did not come through is repeated: longer than it takes to store what was cut off."""


@contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt in the block, again and again until it leaves the block.

    Python raises it wherever the main thread happens to be. In a destructor or a callback of a library it is printed
    and forgotten, and the study would go on. Takes the process' one timer (SIGALRM), from the main thread.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        raise KeyboardInterrupt

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.signal(number, interrupt) for number in signals]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's
