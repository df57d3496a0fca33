"""Every version of a study's search space, with the model and cluster it named; and who drives a study now."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """The one file of each study becomes its first version. What that file referred to was not kept then."""
    op.create_table(
        "spaces",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("model", sa.JSON),
        sa.Column("cluster", sa.JSON),
        sa.PrimaryKeyConstraint("id", name="pk_spaces"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_spaces_study_id", ondelete="CASCADE"),
        sa.UniqueConstraint("study_id", "version", name="uq_spaces_study_id_version"),
    )
    op.execute(
        "INSERT INTO spaces (study_id, version, created_at, text) SELECT id, 1, created_at, space_yaml FROM studies"
    )
    # SQLite can add and drop such columns in place. Alembic's copy of the whole table would lose the trials, whose
    # foreign keys say that they go with their study.
    op.execute("ALTER TABLE studies DROP COLUMN space_yaml")
    op.add_column("trials", sa.Column("space_version", sa.Integer, nullable=False, server_default="1"))
    op.create_table(
        "leases",
        sa.Column("study_name", sa.Text, nullable=False),
        sa.Column("machine", sa.Text, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("process", sa.Integer, nullable=False),
        sa.Column("process_started_at", sa.Double, nullable=False),
        sa.Column("renewed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("study_name", name="pk_leases"),
    )
