"""One driver a study: who gets it, who keeps it, and when another one may have it. On every database."""

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from autotune.errors import StoreError, StudyBusyError
from autotune.store import lease as lease_module
from autotune.store.lease import EXPIRES_AFTER, Driver, Lease
from autotune.store.store import SqlStore, open_store
from autotune.store.tables import Lease as LeaseRow

ROOT = Path(__file__).parents[2]
ELSEWHERE = Driver(machine="another", host="node-7", process=1234, process_started_at=1.0)


@pytest.fixture
def store(store_url: str) -> Iterator[SqlStore]:
    with open_store(store_url, create=True) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.05)


def lost() -> None:
    raise AssertionError("nobody takes this lease")


def age(store: SqlStore, by: timedelta) -> None:
    """As if the lease had been renewed so much earlier."""
    with store._writing() as session:
        row = session.get_one(LeaseRow, "sft")
        session.execute(update(LeaseRow).values(renewed_at=row.renewed_at - by))


def test_a_study_has_one_driver_at_a_time(store: SqlStore) -> None:
    assert store.take_lease("sft", ELSEWHERE)[0] == ELSEWHERE
    with pytest.raises(StudyBusyError, match="process 1234 on node-7") as caught, Lease(store, "sft", lost):
        pass
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    with Lease(store, "other", lost):
        pass
    store.release_lease("sft", ELSEWHERE)
    with Lease(store, "sft", lost):
        assert store.take_lease("sft", ELSEWHERE)[0].process == os.getpid()
    assert store.take_lease("sft", ELSEWHERE)[0] == ELSEWHERE


def test_a_silent_driver_loses_its_study_and_is_told(store: SqlStore) -> None:
    told = threading.Event()
    with Lease(store, "sft", told.set) as lease:
        age(store, EXPIRES_AFTER + timedelta(seconds=1))
        # The holder renews every 50 ms here: it may be quicker than the contender.
        while store.take_lease("sft", ELSEWHERE)[0] != ELSEWHERE:
            age(store, EXPIRES_AFTER + timedelta(seconds=1))
        assert told.wait(10)
        assert lease.lost
    assert store.renew_lease("sft", ELSEWHERE)  # leaving gave nothing of the other's away


def test_a_living_driver_keeps_its_study(store: SqlStore) -> None:
    with Lease(store, "sft", lost) as lease:
        age(store, timedelta(seconds=50))
        silent = timedelta(seconds=50)
        for _ in range(200):
            holder, silent = store.take_lease("sft", ELSEWHERE)
            assert holder == lease._driver
            if silent < timedelta(seconds=10):
                break
            threading.Event().wait(0.05)
        assert silent < timedelta(seconds=10)


def test_a_driver_that_was_killed_on_this_machine_is_not_waited_for(store: SqlStore, store_url: str) -> None:
    code = (
        "import os, sys\nfrom autotune.store.lease import Driver\nfrom autotune.store.store import open_store\n"
        "store = open_store(sys.argv[1], create=True)\nstore.take_lease('sft', Driver.this())\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, store_url], cwd=ROOT, check=False)
    assert done.returncode == -9
    with Lease(store, "sft", lost):
        pass


def test_a_process_id_that_was_used_again_is_not_its_first_owner() -> None:
    this = Driver.this()
    assert not this.is_gone
    assert dataclasses.replace(this, process_started_at=this.process_started_at - 100).is_gone
    assert not dataclasses.replace(this, machine="another", process_started_at=1.0).is_gone


def test_of_many_contenders_one_wins(store: SqlStore) -> None:
    drivers = [dataclasses.replace(ELSEWHERE, process=process) for process in range(8)]
    with ThreadPoolExecutor(8) as threads:
        holders = set(threads.map(lambda driver: store.take_lease("sft", driver)[0], drivers))
    assert len(holders) == 1


def test_a_database_that_is_away_for_a_moment_costs_nothing(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([StoreError("away"), StoreError("away")])
    renewed = threading.Event()
    renew = store.renew_lease

    def flaky(study: str, driver: Driver) -> bool:
        error = next(failures, None)
        if error is not None:
            raise error
        result = renew(study, driver)
        renewed.set()
        return result

    monkeypatch.setattr(store, "renew_lease", flaky)
    with Lease(store, "sft", lost) as lease:
        assert renewed.wait(10)
        assert not lease.lost
