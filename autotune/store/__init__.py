"""Where every study, trial and attempt is kept: SQLite by default, PostgreSQL by URL.

store.py     SqlStore: what the rest of Autotune calls
connect.py   a URL becomes an engine: SQLite's pragmas, network file systems, passwords masked
migrate.py   brings a database to this version's schema
lease.py     one driver a study
tables.py    the tables
migrations/  Alembic's steps from one schema to the next
"""
