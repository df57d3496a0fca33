"""Attempts that confirm a config, by confirmation and round."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Attempts of earlier versions screen."""
    op.add_column("attempts", sa.Column("confirmation", sa.Integer))
    op.add_column("attempts", sa.Column("confirmation_round", sa.Integer))
