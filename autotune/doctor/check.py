"""What a check finds."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """It works, but slower or not for everything."""
    FAIL = "fail"
    """Trials will not run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of what was found."""

    status: Status
    found: str
    remedy: str | None = None
    """What to do; None when there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Check:
    """A named finding."""

    name: str
    status: Status
    found: str
    remedy: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def ok(found: str) -> Finding:
    """Nothing to do."""
    return Finding(Status.OK, found)


def warn(found: str, remedy: str) -> Finding:
    """It works, but not as well as it could."""
    return Finding(Status.WARN, found, remedy)


def fail(found: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(Status.FAIL, found, remedy)


def perform(name: str, examine: Callable[[], Finding]) -> Check:
    """Run one check. One that breaks has found something as well, and must not hide what the others find."""
    try:
        finding = examine()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        finding = fail(f"the check itself failed: {type(error).__name__}: {reason}", "repair what it names")
    found = " ".join(finding.found.split())
    return Check(name, finding.status, found, finding.remedy)
