"""What was predicted of a trial before it ran."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Trials of earlier versions have no prediction."""
    op.add_column("trials", sa.Column("prediction", sa.JSON))
