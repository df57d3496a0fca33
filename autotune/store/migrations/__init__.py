"""Alembic's folder: env.py runs the steps in versions/. `autotune.store.migrate` is the only caller."""
