"""`SqlStore`: studies, trials and attempts in a database. It is the truth; everything in memory is rebuilt from it."""

import dataclasses
import gc
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self

from sqlalchemy import ColumnElement, CursorResult, Delete, Engine, Row, Update, delete, func, select, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from autotune.errors import StoreError
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.outcome import Failure, FailureKind, Measurement, Outcome, outcome_from_dict
from autotune.spec.prediction import Prediction
from autotune.spec.record import AttemptRecord, AttemptState, SpaceRecord, StudyRecord, TrialRecord, Turn
from autotune.spec.sensitivity import Sensitivity
from autotune.store.connect import WRITES, connect, mask_url, parse_url, reported, sqlite_path
from autotune.store.lease import EXPIRES_AFTER, Driver
from autotune.store.migrate import is_current, schema_revision, upgrade_schema
from autotune.store.tables import Attempt, Environment, Lease, Space, Study, Trial

OUTAGE_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Seconds between tries to store an outcome. A measurement costs GPU-minutes, and a database restarts in seconds."""


def open_store(url: str, *, create: bool) -> "SqlStore":
    """Open a database, and bring it to this version's schema.

    Args:
        url: `sqlite:///FILE.db` or `postgresql://USER:PASSWORD@HOST/DATABASE`.
        create: make the file, its folder and the tables where they are missing.

    Raises:
        StoreError: no such database, a URL or driver that cannot be used, a file that is no database, a newer schema.
    """
    parsed = parse_url(url)
    shown = mask_url(url)
    path = sqlite_path(parsed)
    if path is not None and not create and not path.exists():
        raise StoreError(
            f"store {shown}: {path} does not exist; correct the path, or begin a study there with `autotune tune`"
        )
    if path is not None and create:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"store {shown}: folder {path.parent} cannot be made ({error.strerror}); choose another place"
            ) from error
    engine = connect(parsed)
    try:
        with reported(shown):
            with engine.connect() as connection:
                current = is_current(connection)
                empty = schema_revision(connection) is None
            if empty and not create:
                raise StoreError(
                    f"store {shown} holds no study yet; correct the URL, or begin a study there with `autotune tune`"
                )
            if not current:
                with engine.execution_options(**{WRITES: True}).begin() as connection:
                    upgrade_schema(connection, shown)
    except BaseException:
        engine.dispose()
        raise
    return SqlStore(engine, shown)


class SqlStore:
    """An open store. Each call is one transaction; threads and processes may share a database.

    Every call raises `StoreError` when the database fails or the study is unknown.
    """

    def __init__(self, engine: Engine, shown_url: str) -> None:
        self._engine = engine
        self._writing_engine = engine.execution_options(**{WRITES: True})
        self.shown_url = shown_url
        """The URL with its password masked."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the store is of no further use."""
        self._engine.dispose()

    def studies(self) -> list[StudyRecord]:
        """Every study, oldest first."""
        with self._reading() as session:
            return [_study_record(session, row) for row in session.scalars(select(Study).order_by(Study.id))]

    def study(self, name: str) -> StudyRecord | None:
        """One study; None where there is none of that name."""
        with self._reading() as session:
            row = session.scalar(select(Study).where(Study.name == name))
            return None if row is None else _study_record(session, row)

    def create_study(self, name: str, space: SpaceRecord, identity: str) -> StudyRecord:
        """Add a study, with the first version of its search space.

        Raises:
            StoreError: the name is taken.
        """
        with self._writing() as session:
            if session.scalar(select(Study.id).where(Study.name == name)) is not None:
                raise StoreError(f"study {name!r} is in {self.shown_url} already; resume it, or choose another name")
            row = Study(name=name, created_at=_now(), identity=identity)
            session.add(row)
            session.flush()
            session.add(_space_row(row.id, 1, space))
            session.flush()
            return _study_record(session, row)

    def add_space(self, name: str, space: SpaceRecord) -> int:
        """Keep the edited search space of a study as its next version, and return that version's number."""
        with self._writing() as session:
            study_id = self._study_id(session, name, lock=True)
            version = _space_version(session, study_id) + 1
            session.add(_space_row(study_id, version, space))
            return version

    def keep_sensitivity(self, name: str, sensitivity: Sensitivity) -> None:
        """Keep what was found about a study's winner, in place of what was found before."""
        with self._writing() as session:
            study_id = self._study_id(session, name, lock=True)
            session.execute(update(Study).where(Study.id == study_id).values(sensitivity=sensitivity.to_dict()))

    def trials(self, study: str) -> list[TrialRecord]:
        """Every trial of a study with its attempts, by number. One query, however many there are."""
        query = (
            select(
                Trial.number.label("trial_number"), Trial.config, Trial.source, Trial.space_version, Trial.prediction,
                Attempt.id, Attempt.number, Attempt.state, Attempt.started_at, Attempt.finished_at, Attempt.outcome,
                Attempt.confirmation, Attempt.confirmation_round,
            )
            .join(Attempt, Attempt.trial_id == Trial.id)
            .order_by(Trial.number, Attempt.number)
        )  # fmt: skip
        with self._reading() as session, _without_collection():
            query = query.where(Trial.study_id == self._study_id(session, study))
            # In portions: all rows of a long study beside their records would take twice the memory.
            rows = session.execute(query.execution_options(yield_per=500))
            return [
                _trial_record(list(group)) for _, group in itertools.groupby(rows, key=lambda row: row.trial_number)
            ]

    def begin_attempt(
        self,
        study: str,
        config: TrialConfig,
        source: str,
        prediction: Prediction | None = None,
        turn: Turn | None = None,
    ) -> tuple[int, int]:
        """Note that a config is about to run: a new trial if the study has not seen the config, and a running attempt.

        Args:
            study: name of the study.
            config: what is about to run.
            source: `baseline` or `search`; a trial keeps the first one it got.
            prediction: what is expected of it; a trial keeps the first one it got.
            turn: of an attempt that confirms the config.

        Returns:
            The trial's number, and the attempt's id for `finish_attempt`.
        """
        with self._writing() as session:
            # The lock on the study gives out trial numbers one at a time, on PostgreSQL too.
            study_id = self._study_id(session, study, lock=True)
            fingerprint = config.fingerprint
            trial = session.scalar(select(Trial).where(Trial.study_id == study_id, Trial.fingerprint == fingerprint))
            if trial is None:
                last = session.scalar(select(func.max(Trial.number)).where(Trial.study_id == study_id))
                trial = Trial(
                    study_id=study_id,
                    number=(last or 0) + 1,
                    fingerprint=fingerprint,
                    config=config.to_dict(),
                    source=source,
                    prediction=None if prediction is None else prediction.to_dict(),
                    space_version=_space_version(session, study_id),
                )
                session.add(trial)
                session.flush()
            last = session.scalar(select(func.max(Attempt.number)).where(Attempt.trial_id == trial.id))
            attempt = Attempt(
                trial_id=trial.id,
                number=(last or 0) + 1,
                state=AttemptState.RUNNING.value,
                started_at=_now(),
                confirmation=None if turn is None else turn.confirmation,
                confirmation_round=None if turn is None else turn.round,
            )
            session.add(attempt)
            session.flush()
            return trial.number, attempt.id

    def finish_attempt(self, attempt_id: int, outcome: Outcome) -> None:
        """Keep what a running attempt found out. A database that is away is waited for, two minutes in all.

        Raises:
            StoreError: there is no such attempt, or it is not running.
        """
        for pause in (*OUTAGE_PAUSES, None):
            try:
                self._finish_attempt(attempt_id, outcome)
                return
            except StoreError as error:
                if pause is None or not isinstance(error.__cause__, OperationalError):
                    raise
                time.sleep(pause)

    def _finish_attempt(self, attempt_id: int, outcome: Outcome) -> None:
        with self._writing() as session:
            attempt = session.scalar(select(Attempt).where(Attempt.id == attempt_id).with_for_update())
            if attempt is None:
                raise StoreError(f"store {self.shown_url} has no attempt {attempt_id}; begin one before finishing it")
            if attempt.outcome == json.loads(json.dumps(outcome.to_dict())):
                return  # an earlier try got through, only its answer did not
            if attempt.state != AttemptState.RUNNING:
                raise StoreError(
                    f"attempt {attempt_id} in {self.shown_url} is {attempt.state}, not running, so its outcome was not"
                    " kept; check that no other tuner runs the same study"
                )
            attempt.finished_at = _now()
            attempt.outcome = outcome.to_dict()
            attempt.elapsed_seconds = outcome.elapsed_seconds
            attempt.log_path = outcome.log_path
            if isinstance(outcome, Failure):
                interrupted = outcome.kind is FailureKind.INTERRUPTED
                attempt.state = (AttemptState.INTERRUPTED if interrupted else AttemptState.FAILED).value
                attempt.kind = outcome.kind.value
            else:
                attempt.state = AttemptState.COMPLETE.value
                attempt.tokens_per_second_per_gpu = outcome.tokens_per_second_per_gpu
                attempt.peak_memory_allocated_bytes = outcome.peak_memory_allocated_bytes
                attempt.environment_id = _environment_id(session, outcome)

    def interrupt_running(self, study: str) -> int:
        """Mark every running attempt of a study interrupted: what a crash of the tuner left behind.

        Returns:
            How many there were.
        """
        with self._writing() as session:
            trials = select(Trial.id).where(Trial.study_id == self._study_id(session, study))
            return _rows(
                session,
                update(Attempt)
                .where(Attempt.state == AttemptState.RUNNING.value, Attempt.trial_id.in_(trials))
                .values(state=AttemptState.INTERRUPTED.value, finished_at=_now()),
            )

    def take_lease(self, study: str, driver: Driver) -> tuple[Driver, timedelta]:
        """Make `driver` the one that drives the study, unless a living one has it. Use `autotune.store.lease.Lease`.

        Returns:
            Who has the lease now, and how long ago that driver was last heard of.
        """
        with self._writing() as session:
            query = select(Lease).where(Lease.study_name == study).with_for_update()
            row = session.scalar(query)
            now = _clock(session)
            if row is None:
                row = Lease(study_name=study, renewed_at=now, **dataclasses.asdict(driver))
                try:
                    with session.begin_nested():
                        session.add(row)
                    return driver, timedelta()
                except IntegrityError:  # another driver took it in the same moment
                    row = session.scalar(query)
                    assert row is not None
            holder = Driver(
                machine=row.machine, host=row.host, process=row.process, process_started_at=row.process_started_at
            )
            silent = now - row.renewed_at
            if holder != driver and not holder.is_gone and silent <= EXPIRES_AFTER:
                return holder, silent
            for name, value in dataclasses.asdict(driver).items():
                setattr(row, name, value)
            row.renewed_at = now
            return driver, timedelta()

    def renew_lease(self, study: str, driver: Driver) -> bool:
        """Say that the driver lives; False if another one has the study now."""
        with self._writing() as session:
            return _rows(session, update(Lease).where(*_held(study, driver)).values(renewed_at=_clock(session))) == 1

    def release_lease(self, study: str, driver: Driver) -> None:
        """Give the study free, if the driver still has it."""
        with self._writing() as session:
            _rows(session, delete(Lease).where(*_held(study, driver)))

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with reported(self.shown_url), Session(self._engine) as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with reported(self.shown_url), Session(self._writing_engine) as session, session.begin():
            yield session

    def _study_id(self, session: Session, name: str, *, lock: bool = False) -> int:
        query = select(Study.id).where(Study.name == name)
        found = session.scalar(query.with_for_update() if lock else query)
        if found is None:
            names = session.scalars(select(Study.name).order_by(Study.name)).all()
            known = f"it has {', '.join(names)}" if names else "it holds no study yet"
            raise StoreError(f"study {name!r} is not in {self.shown_url}; {known}")
        return found


@contextmanager
def _without_collection() -> Iterator[None]:
    """Nothing that is read can be garbage yet, and looking for some among it takes as long as reading it; later too,
    where a study's trials live as long as its process.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _now() -> datetime:
    return datetime.now(UTC)


def _clock(session: Session) -> datetime:
    """The one clock that all drivers of a database see: its server's, or for a file this machine's."""
    if session.get_bind().dialect.name == "sqlite":
        return _now()
    return session.scalars(select(func.now())).one()


def _held(study: str, driver: Driver) -> list[ColumnElement[bool]]:
    """The lease of the study, if the driver has it."""
    return [
        Lease.study_name == study,
        Lease.machine == driver.machine,
        Lease.process == driver.process,
        Lease.process_started_at == driver.process_started_at,
    ]


def _rows(session: Session, statement: Update | Delete) -> int:
    """Execute the statement; how many rows it has changed."""
    result = session.execute(statement, execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    return result.rowcount


def _study_record(session: Session, row: Study) -> StudyRecord:
    space = session.scalars(select(Space).where(Space.study_id == row.id).order_by(Space.version.desc())).first()
    assert space is not None  # a study is made together with its first version
    return StudyRecord(
        name=row.name,
        created_at=row.created_at,
        space=SpaceRecord(
            text=space.text,
            model=None if space.model is None else ModelSpec(**space.model),
            cluster=None if space.cluster is None else ClusterSpec.from_dict(space.cluster),
        ),
        space_version=space.version,
        identity=row.identity,
        sensitivity=None if row.sensitivity is None else Sensitivity.from_dict(row.sensitivity),
    )


def _space_row(study_id: int, version: int, space: SpaceRecord) -> Space:
    return Space(
        study_id=study_id,
        version=version,
        created_at=_now(),
        text=space.text,
        model=None if space.model is None else {"name": space.model.name, "config": space.model.config},
        cluster=None if space.cluster is None else space.cluster.to_dict(),
    )


def _space_version(session: Session, study_id: int) -> int:
    """The newest version of a study's search space."""
    return session.scalar(select(func.max(Space.version)).where(Space.study_id == study_id)) or 0


def _trial_record(rows: Sequence[Row[Any]]) -> TrialRecord:
    """One trial from the rows of its attempts."""
    attempts = tuple(
        AttemptRecord(
            id=row.id,
            number=row.number,
            state=AttemptState(row.state),
            started_at=row.started_at,
            finished_at=row.finished_at,
            outcome=None if row.outcome is None else outcome_from_dict(row.outcome),
            turn=None if row.confirmation is None else Turn(row.confirmation, row.confirmation_round),
        )
        for row in rows
    )
    return TrialRecord(
        number=rows[0].trial_number,
        config=TrialConfig.from_dict(rows[0].config),
        source=rows[0].source,
        space_version=rows[0].space_version,
        prediction=None if rows[0].prediction is None else Prediction.from_dict(rows[0].prediction),
        attempts=attempts,
    )


def _environment_id(session: Session, measurement: Measurement) -> int | None:
    """The row of the environment that rank 0 reported, added if new; None where no rank is kept."""
    if not measurement.ranks:
        return None
    versions: dict[str, Any] = dict(measurement.ranks[0].environment)
    canonical = json.dumps(versions, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    query = select(Environment.id).where(Environment.fingerprint == fingerprint)
    found = session.scalar(query)
    if found is not None:
        return found
    try:
        with session.begin_nested():
            row = Environment(fingerprint=fingerprint, versions=versions)
            session.add(row)
        return row.id
    except IntegrityError:  # another tuner has just added the same one
        return session.scalar(query)
