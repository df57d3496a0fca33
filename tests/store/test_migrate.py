import json
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from autotune.errors import StoreError
from autotune.spec.config import TrialConfig
from autotune.spec.record import SpaceRecord
from autotune.store.connect import WRITES, connect, parse_url, sqlite_path
from autotune.store.migrate import VERSION_TABLE, _alembic_config, is_current, schema_revision
from autotune.store.store import open_store
from autotune.store.tables import Base


def test_the_steps_end_where_the_tables_are(store_url: str) -> None:
    with open_store(store_url, create=True) as store, store._engine.connect() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []
        assert is_current(connection)
        assert set(inspect(connection).get_table_names()) == {*Base.metadata.tables, VERSION_TABLE}


def test_opening_again_changes_nothing(store_url: str) -> None:
    for create in (True, False, True):
        with open_store(store_url, create=create) as store, store._engine.connect() as connection:
            assert schema_revision(connection) == "0005"


def test_a_newer_schema_is_refused(store_url: str) -> None:
    with open_store(store_url, create=True) as store, store._engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"its schema 9999 is newer than this Autotune knows \(0005\)") as caught:
        open_store(store_url, create=True)
    assert "\n" not in str(caught.value)


def test_a_store_of_the_first_schema_keeps_its_studies_and_trials(store_url: str) -> None:
    """What 0001 could hold: a study with one trial of one attempt."""
    engine = connect(parse_url(store_url))
    path = sqlite_path(parse_url(store_url))
    if path is not None:
        path.parent.mkdir(parents=True)
    config = TrialConfig(engine="pytorch", gpus=2, micro_batch_size=1, sequence_length=512)
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        command.upgrade(_alembic_config(connection), "0001")
        connection.execute(
            text("INSERT INTO studies VALUES (1, 'old', '2026-01-02 03:04:05', 'study: old', '0123456789abcdef')")
        )
        connection.execute(
            text("INSERT INTO trials VALUES (1, 1, 1, :fingerprint, :config, 'search')"),
            {"fingerprint": config.fingerprint, "config": json.dumps(config.to_dict())},
        )
        connection.execute(
            text("INSERT INTO attempts (id, trial_id, number, state, started_at) VALUES (1, 1, 1, 'running', :now)"),
            {"now": "2026-01-02 03:04:06"},
        )
    engine.dispose()
    with open_store(store_url, create=False) as store:
        (study,) = store.studies()
        assert (study.name, study.space_version) == ("old", 1)
        assert study.space == SpaceRecord(text="study: old", model=None, cluster=None)
        (trial,) = store.trials("old")
        assert (trial.config, trial.space_version, len(trial.attempts)) == (config, 1, 1)
        assert store.interrupt_running("old") == 1


def test_tables_of_another_program_are_left_alone(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "optuna.db")
    connection.executescript(
        "CREATE TABLE studies (study_id INTEGER); CREATE TABLE alembic_version (version_num TEXT);"
    )
    connection.close()
    with pytest.raises(StoreError, match=r"tables of another program \(studies\)"):
        open_store(f"sqlite:///{tmp_path}/optuna.db", create=True)


def test_a_failed_step_leaves_nothing(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("alembic.runtime.migration.MigrationContext._ensure_version_table", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            open_store(store_url, create=True)
    with open_store(store_url, create=True) as store:
        assert store.studies() == []


def test_nothing_is_needed_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store("sqlite:///here.db", create=True):
        pass
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"here.db"}
