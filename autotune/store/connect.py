"""From a URL to an engine that is safe to write to: SQLite's pragmas, PostgreSQL's driver, passwords masked."""

import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from autotune.errors import StoreError

WRITES = "autotune_writes"
"""Execution option of a connection that is going to write: on SQLite its transaction takes the write lock at once."""

_BUSY_SECONDS = 60.0
"""How long SQLite waits for another process's transaction: ours take milliseconds, on a slow network disk seconds."""

# WAL needs memory that all processes share, which no file system that spans machines offers (sqlite.org/wal.html).
_NETWORK_FILE_SYSTEM = re.compile(
    r"nfs\d*|cifs|smb\w*|lustre|gpfs|beegfs\w*|9p|ceph|glusterfs|afs|ocfs2|gfs2|pvfs2|orangefs|panfs|wekafs|virtiofs"
    r"|vboxsf|fuse(\..*)?"
)


def mask_url(url: str) -> str:
    """The URL for people: a password reads `***`. Works on what is no valid URL as well."""
    masked = re.sub(r"(://[^:/@\s]*:).*(@)", r"\1***\2", url)
    return re.sub(r"([?&](?:password|sslpassword)=)[^&]*", r"\1***", masked)


def parse_url(url: str) -> URL:
    """Read a database URL and settle its driver.

    Raises:
        StoreError: it is no URL, or not one of SQLite or PostgreSQL; or it names SQLite's memory.
    """
    shown = mask_url(url)
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StoreError(
            f"store {shown!r} is no database URL; write sqlite:///FILE.db or postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(
            f"store {shown!r}: found database {parsed.get_backend_name()!r}, but only sqlite and postgresql are"
            " supported; write sqlite:///FILE.db or postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError(f"store {shown!r} would be lost with the process; name a file: sqlite:///FILE.db")
    return parsed


def sqlite_path(url: URL) -> Path | None:
    """The file of a SQLite database; None for a server."""
    if url.get_backend_name() != "sqlite":
        return None
    return Path(str(url.database)).absolute()


def connect(url: URL) -> Engine:
    """Make the engine; nothing is opened yet.

    Raises:
        StoreError: the driver is unknown or not installed.
    """
    shown = mask_url(url.render_as_string(hide_password=True))
    path = sqlite_path(url)
    try:
        if path is None:
            # A server may have been restarted since the last trial, hours ago: ask before a connection is used again.
            return create_engine(url, pool_pre_ping=True)
        engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS})
    except ModuleNotFoundError as error:
        raise StoreError(
            f"store {shown!r} needs the Python package {error.name}; pip install 'autotune-llm[postgres]' has psycopg,"
            " the driver of postgresql:// URLs"
        ) from None
    except (ArgumentError, TypeError) as error:
        raise StoreError(
            f"store {shown!r}: driver {url.drivername!r} cannot be used ({_first_line(error)});"
            " write sqlite:///FILE.db or postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from None
    _prepare_sqlite(engine, journal_mode(path))
    return engine


def journal_mode(path: Path, mounts: Iterable[tuple[str, str]] | None = None) -> str:
    """SQLite's journal mode for a database at `path`: `wal`, or `delete` on a network file system.

    Args:
        path: absolute; the file need not exist yet.
        mounts: (mount point, file system type) of every mount; those of this machine by default.
    """
    if mounts is None:
        mounts = [(partition.mountpoint, partition.fstype) for partition in psutil.disk_partitions(all=True)]
    real = path.resolve()
    covering = [(Path(point), kind) for point, kind in mounts if real.is_relative_to(point)]
    # The deepest mount holds the file; of two on one point, the later one covers the earlier.
    kind = max(enumerate(covering), key=lambda entry: (len(entry[1][0].parts), entry[0]))[1][1] if covering else ""
    return "delete" if _NETWORK_FILE_SYSTEM.fullmatch(kind.lower()) else "wal"


@contextmanager
def reported(shown_url: str) -> Iterator[None]:
    """Turn what the database or its driver raises into one sentence.

    Raises:
        StoreError: in place of any error of SQLAlchemy or SQLite.
    """
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        raise StoreError(
            f"store {shown_url} cannot be used ({_first_line(cause)});"
            " check that it is a database of Autotune, whole, reachable and writable"
        ) from error


def _prepare_sqlite(engine: Engine, mode: str) -> None:
    @event.listens_for(engine, "connect")
    def set_pragmas(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # the driver opens no transaction of its own: `begin` below does
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA synchronous = FULL")  # a finished attempt survives a power cut
        # The mode is kept in the file; changing it needs the file for oneself, so it is changed only where it differs.
        cursor.execute("PRAGMA journal_mode")
        row = cursor.fetchone()
        if row is None or row[0].lower() != mode:
            try:
                cursor.execute(f"PRAGMA journal_mode = {mode}")
            except sqlite3.OperationalError:
                # Another process has just opened the new file as well. Without WAL it is slower, not less safe.
                if mode != "wal":
                    raise
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later cannot wait for the lock, it fails: so take the lock at once.
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return mask_url(lines[0]) if lines else type(error).__name__
