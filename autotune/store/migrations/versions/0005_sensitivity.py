"""What one step away from a study's winner does, as it was last found."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Studies of earlier versions have none."""
    op.add_column("studies", sa.Column("sensitivity", sa.JSON))
