"""A real PostgreSQL server for the tests, on a socket of its own; skipped where none is installed."""

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Callable[[], str]]:
    """Makes an empty database at each call and returns its URL."""
    psycopg = pytest.importorskip("psycopg")
    programs = {name: shutil.which(name) for name in ("initdb", "pg_ctl")}
    if not all(programs.values()):
        pytest.skip("no initdb and pg_ctl on the PATH")
    # PostgreSQL refuses root. `nobody` is on every Linux, and pytest's own folders are closed to it.
    user = "nobody" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="autotune-postgres-"))
    if user:
        shutil.chown(folder, user)
    data = folder / "data"

    def run(program: str, *arguments: str) -> None:
        command = [str(programs[program]), "-D", str(data), *arguments]
        # pg_ctl's server inherits the pipes, so output goes to a file or a reader would wait for ever.
        with (folder / "setup.log").open("ab") as log:
            subprocess.run(command, check=True, user=user, stdout=log, stderr=log, cwd=folder, timeout=60)

    try:
        run("initdb", "-U", "postgres", "-A", "trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
        run("pg_ctl", "-w", "-l", str(data / "server.log"), "-o", options, "start")
        try:

            def new_database() -> str:
                name = f"autotune_{uuid.uuid4().hex}"
                with psycopg.connect(host=str(folder), user="postgres", dbname="postgres", autocommit=True) as admin:
                    admin.execute(f'CREATE DATABASE "{name}"'.encode())
                return f"postgresql://postgres@/{name}?host={folder}"

            yield new_database
        finally:
            run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database that does not exist yet (SQLite) or is empty (PostgreSQL)."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/runs/autotune.db"
    new_database: Callable[[], str] = request.getfixturevalue("postgres_server")
    return new_database()
