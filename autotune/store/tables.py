"""The tables. A change here needs a migration of the same shape: tests/store/test_migrate.py compares the two."""

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC. SQLite keeps no time zone, so that one is put back when a row is read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Python to database."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without time zone: {value}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Database to Python."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class JsonText(TypeDecorator[dict[str, Any]]):
    """JSON kept as text. PostgreSQL's own JSON refuses NaN, and a loss that blew up must not cost its row."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Dialect) -> str | None:
        """Python to database."""
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, Any] | None:
        """Database to Python."""
        return None if value is None else dict(json.loads(value))


class Base(DeclarativeBase):
    """Root of the tables. Constraints get names, without which a later migration could not drop them."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )


class Study(Base):
    """One name of `study:` in a search-space file."""

    __tablename__ = "studies"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Text, unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    identity: Mapped[str] = mapped_column(Text)
    sensitivity: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """Of the winner, as `tune` last found it: it needs predictions, which reading verbs do not make."""


class Space(Base):
    """A search-space file of a study, as it was first used or later edited, with the model and cluster it named."""

    __tablename__ = "spaces"
    __table_args__ = (UniqueConstraint("study_id", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"))
    version: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    text: Mapped[str] = mapped_column(Text)
    model: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    cluster: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class Lease(Base):
    """The one process that drives a study. A lease may be taken before the study is there."""

    __tablename__ = "leases"

    study_name: Mapped[str] = mapped_column(Text, primary_key=True)
    machine: Mapped[str] = mapped_column(Text)
    host: Mapped[str] = mapped_column(Text)
    process: Mapped[int]
    process_started_at: Mapped[float] = mapped_column(Double)
    renewed_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Trial(Base):
    """One config of one study."""

    __tablename__ = "trials"
    __table_args__ = (UniqueConstraint("study_id", "fingerprint"), UniqueConstraint("study_id", "number"))

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"))
    number: Mapped[int]
    fingerprint: Mapped[str] = mapped_column(String(16))
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    source: Mapped[str] = mapped_column(String(16))
    prediction: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    space_version: Mapped[int] = mapped_column(server_default="1")


class Environment(Base):
    """Versions and hardware under which attempts ran; results are comparable only within one."""

    __tablename__ = "environments"

    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(16), unique=True)
    versions: Mapped[dict[str, Any]] = mapped_column(JSON)


class Attempt(Base):
    """One run of a trial. `outcome` is the truth; the columns beside it repeat what people ask for in SQL."""

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("trial_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(String(16), index=True)
    kind: Mapped[str | None] = mapped_column(String(32))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    elapsed_seconds: Mapped[float | None] = mapped_column(Double)
    outcome: Mapped[dict[str, Any] | None] = mapped_column(JsonText)
    tokens_per_second_per_gpu: Mapped[float | None] = mapped_column(Double)
    peak_memory_allocated_bytes: Mapped[int | None] = mapped_column(BigInteger)
    log_path: Mapped[str | None] = mapped_column(Text)
    environment_id: Mapped[int | None] = mapped_column(ForeignKey("environments.id"))
    confirmation: Mapped[int | None]
    """Of an attempt that confirms its config: which confirmation of the study; NULL of one that screens it."""
    confirmation_round: Mapped[int | None]
