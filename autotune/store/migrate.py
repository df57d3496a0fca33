"""Brings a database to the schema of this version of Autotune, from inside the package: no alembic.ini anywhere."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from autotune.errors import StoreError
from autotune.store.tables import Base

VERSION_TABLE = "autotune_schema"
"""Not Alembic's default name, which Optuna's databases use, beside a `studies` and a `trials` of their own."""

_MIGRATION_LOCK = 0x6175746F74756E65
"""Key of PostgreSQL's advisory lock; any constant that nobody else uses ("autotune" in ASCII)."""


def schema_revision(connection: Connection) -> str | None:
    """The schema that the database has; None where it has none of ours."""
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


def is_current(connection: Connection) -> bool:
    """Whether the database has exactly this version's schema."""
    return schema_revision(connection) == ScriptDirectory.from_config(_alembic_config(connection)).get_current_head()


def is_known(connection: Connection) -> bool:
    """Whether the database has this version's schema or an earlier one."""
    scripts = ScriptDirectory.from_config(_alembic_config(connection))
    return schema_revision(connection) in {script.revision for script in scripts.walk_revisions()}


def upgrade_schema(connection: Connection, shown_url: str) -> None:
    """Create or upgrade the tables within the caller's transaction; nothing to do is the usual case.

    Args:
        connection: in a transaction that may write. On SQLite it must hold the write lock already.
        shown_url: the URL with its password masked, for messages.

    Raises:
        StoreError: the schema is newer than this version knows, or the tables belong to another program.
    """
    if connection.dialect.name == "postgresql":
        # Two tuners may start on one new database in the same second; the second waits here and then finds it done.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
    config = _alembic_config(connection)
    scripts = ScriptDirectory.from_config(config)
    found, newest = schema_revision(connection), scripts.get_current_head()
    if found == newest:
        return
    if found is None:
        foreign = sorted(set(inspect(connection).get_table_names()) & set(Base.metadata.tables))
        if foreign:
            raise StoreError(
                f"store {shown_url}: found tables of another program ({', '.join(foreign)});"
                " give Autotune a database of its own"
            )
    elif not is_known(connection):
        raise StoreError(
            f"store {shown_url}: its schema {found} is newer than this Autotune knows ({newest});"
            " upgrade Autotune, or use another database"
        )
    command.upgrade(config, "head")


def _alembic_config(connection: Connection) -> Config:
    config = Config()
    folder = str(Path(__file__).with_name("migrations"))
    config.set_main_option("script_location", folder.replace("%", "%%"))  # % is ConfigParser's
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config
