"""Runs the steps on the connection, and in the transaction, that `autotune.store.migrate` hands over."""

from alembic import context

from autotune.store.migrate import VERSION_TABLE
from autotune.store.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
