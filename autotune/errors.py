"""The errors a user can cause, and the exit code that each one means.

    AutotuneError
    ├── UsageError                 2  a bad file, key, value or combination
    │   ├── InvalidSpaceError         the search-space file
    │   ├── InvalidModelError         a model name, folder or config
    │   ├── UnknownHardwareError      a GPU that the table does not know
    │   └── StoreError                a database that cannot be used
    │       └── StudyBusyError           another process runs the study
    ├── NothingFeasibleError       3  every candidate is refused or runs out of memory
    └── ClusterError               5  the cluster cannot be reached, or lacks what the study asks for

A message is one sentence: what, where, what was found, what to do. A failed trial is no exception: it is a `Failure`,
a result like any other (`autotune.spec.outcome`).
"""

import reprlib
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    """Finished; a spent budget is finished."""
    EVERY_TRIAL_FAILED = 1
    """Every trial failed for reasons other than memory."""
    USAGE = 2
    NOTHING_FEASIBLE = 3
    STOPPED = 4
    """Stopped before the budget was spent; the same command resumes."""
    CLUSTER = 5
    """The cluster is unreachable, refuses us, or lacks the hardware that the study names."""
    INTERRUPTED = 130


class AutotuneError(Exception):
    """Base of everything that is reported to the user as one sentence."""

    exit_code = ExitCode.USAGE


class UsageError(AutotuneError, ValueError):
    """Something the user wrote cannot be used."""


class InvalidSpaceError(UsageError):
    """The search-space file is wrong."""


class InvalidModelError(UsageError):
    """The model cannot be found or is not one we can build."""


class UnknownHardwareError(UsageError):
    """The GPU is not in the table of `autotune.spec.cluster`."""


class StoreError(UsageError):
    """The database is missing, unreadable, or of another schema."""


class StudyBusyError(StoreError):
    """Another process runs the study."""


class NothingFeasibleError(AutotuneError):
    """No candidate is left that could run."""

    exit_code = ExitCode.NOTHING_FEASIBLE


class ClusterError(AutotuneError):
    """The cluster is unreachable, or has not what the study needs."""

    exit_code = ExitCode.CLUSTER


_BOUNDED = reprlib.Repr()
_BOUNDED.maxstring = _BOUNDED.maxother = _BOUNDED.maxlong = 80


def shown(value: object) -> str:
    """A value that a user wrote, for a message: one line, at most 80 characters, whatever it is."""
    try:
        text = _BOUNDED.repr(value)
    except ValueError:
        return "a number of thousands of digits"  # Python refuses to write more than 4300
    return text if len(text) <= 80 else f"{text[:77]}..."
