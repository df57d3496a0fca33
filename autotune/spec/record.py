"""What a store remembers of a study: the study, its search space, its trials, and each attempt to measure one."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.outcome import Outcome
from autotune.spec.prediction import Prediction
from autotune.spec.sensitivity import Sensitivity


class AttemptState(StrEnum):
    """Where an attempt stands."""

    RUNNING = "running"
    COMPLETE = "complete"
    """It has a measurement."""
    FAILED = "failed"
    """It has a failure."""
    INTERRUPTED = "interrupted"
    """It was cut off, by us or by a crash, and says nothing about its config."""


class Turn(NamedTuple):
    """Which run of which confirmation an attempt is."""

    confirmation: int
    """1, 2, … within the study: runs of different ones are never compared."""
    round: int
    """1, 2, … within the confirmation: in each, every contender runs once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One run of a trial. Times are aware and in UTC."""

    id: int
    number: int
    """1, 2, … within its trial."""
    state: AttemptState
    started_at: datetime
    finished_at: datetime | None
    """None while it runs."""
    outcome: Outcome | None
    """None while it runs, and where a crash of the tuner cut it off."""
    turn: Turn | None = None
    """None of an attempt that screens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One config of a study, and all that was tried to measure it."""

    number: int
    """1, 2, … within its study, in the order of the first attempts."""
    config: TrialConfig
    source: str
    """Who proposed it: `baseline` or `search`."""
    space_version: int
    """The version of the search space in which it was proposed."""
    attempts: tuple[AttemptRecord, ...]
    """By number; at least one, of which the first one screens."""
    prediction: Prediction | None = None
    """What was expected before the first attempt; None where nothing was."""

    @property
    def fingerprint(self) -> str:
        """See `TrialConfig.fingerprint`; unique within a study."""
        return self.config.fingerprint

    @property
    def screenings(self) -> tuple[AttemptRecord, ...]:
        """The attempts that screen, by number."""
        return tuple(attempt for attempt in self.attempts if attempt.turn is None)

    @property
    def outcome(self) -> Outcome | None:
        """What the last screening found out; None while it runs or where it was interrupted."""
        last = self.screenings[-1] if self.screenings else None
        return None if last is None or last.state is AttemptState.INTERRUPTED else last.outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceRecord:
    """A search-space file with what it referred to, so that a study can be read where nothing but its store is."""

    text: str
    """The file, word for word."""
    model: ModelSpec | None
    """None where a version of Autotune that kept only the file has stored it."""
    cluster: ClusterSpec | None
    """As stated in the file or found by `cluster: auto`; None like `model`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """A study, and its search space as it was last edited."""

    name: str
    created_at: datetime
    """Aware and in UTC."""
    space: SpaceRecord
    space_version: int
    """1, 2, … counts the edits of the file."""
    identity: str
    """Digest of what a study must keep to stay the same study; the store compares nothing, it only keeps it."""
    sensitivity: Sensitivity | None = None
    """Of the winner, as `tune` last found it; None before."""
