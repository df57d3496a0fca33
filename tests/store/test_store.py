"""What every database must do (`TestStore`, on SQLite and PostgreSQL), and what only SQLite does."""

import math
import multiprocessing
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError

from autotune.errors import StoreError
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import ENGINES, PRECISIONS, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.outcome import Failure, FailureKind, Measurement, Phase, RankMeasurement
from autotune.spec.record import AttemptState, SpaceRecord
from autotune.store import store as store_module
from autotune.store.connect import journal_mode, mask_url
from autotune.store.store import SqlStore, open_store


def config(micro_batch_size: int = 1) -> TrialConfig:
    return TrialConfig(engine="pytorch", gpus=2, micro_batch_size=micro_batch_size, sequence_length=512)


def space(text: str = "") -> SpaceRecord:
    model = ModelSpec(name="tiny", config={"model_type": "qwen3", "hidden_size": 64})
    return SpaceRecord(text=text, model=model, cluster=ClusterSpec(nodes=2, gpus_per_node=8, gpu=find_gpu("H100-80GB")))


def measurement(ranks: int = 2, loss: float = 2.5) -> Measurement:
    rank_measurements = tuple(
        RankMeasurement(
            rank=rank,
            micro_step_seconds=(0.1, 0.11, 0.1, 0.1),
            update_step_seconds=(0.2, 0.21),
            losses=(loss,) * 7,
            peak_memory_allocated_bytes=60 * 2**30,
            peak_memory_reserved_bytes=61 * 2**30,
            peak_device_used_bytes=62 * 2**30,
            device_memory_bytes=79 * 2**30,
            allocator_retries=0,
            phase_seconds={"start": 1.0, "build": 2.0, "warmup": 3.0, "measure": 4.0},
            environment={"torch": "2.8.0", "gpu": "H100-80GB"},
        )
        for rank in range(ranks)
    )
    return Measurement(
        step_time_seconds=1.5,
        tokens_per_second_per_gpu=1234.5,
        model_flops_utilization=0.4,
        peak_memory_allocated_bytes=60 * 2**30,
        peak_memory_reserved_bytes=61 * 2**30,
        peak_device_used_bytes=62 * 2**30,
        device_memory_bytes=79 * 2**30,
        allocator_retries=0,
        phase_seconds={"start": 1.0, "build": 2.0, "warmup": 3.0, "measure": 4.0},
        ranks=rank_measurements,
        elapsed_seconds=12.5,
        log_path="logs/1.log",
    )


def failure(kind: FailureKind) -> Failure:
    return Failure(kind=kind, phase=Phase.BACKWARD, message="line one\nline two \x00 é", rank=1, requested_bytes=2**33)


configs = st.builds(
    TrialConfig,
    engine=st.sampled_from(ENGINES),
    gpus=st.integers(1, 4096),
    micro_batch_size=st.integers(1, 1024),
    sequence_length=st.integers(1, 2**20),
    precision=st.sampled_from(PRECISIONS),
    zero_stage=st.integers(0, 3),
    selective_every=st.none() | st.integers(1, 64),
    deepspeed=st.dictionaries(
        st.text(min_size=1),
        st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        max_size=3,
    ).map(lambda keys: tuple(keys.items())),
)


class TestStore:
    """The conformance class: one behaviour a test, whatever the database."""

    @pytest.fixture
    def store(self, store_url: str) -> Iterator[SqlStore]:
        with open_store(store_url, create=True) as store:
            yield store

    @pytest.fixture
    def study(self, store: SqlStore) -> str:
        store.create_study("sft", space("study: sft\n# é 漢\n"), "0123abcd")
        return "sft"

    def test_a_new_store_is_empty(self, store: SqlStore) -> None:
        assert store.studies() == []
        assert store.study("sft") is None

    def test_without_create_an_empty_place_is_refused(self, store_url: str) -> None:
        with pytest.raises(StoreError, match="autotune tune") as caught:
            open_store(store_url, create=False)
        assert "\n" not in str(caught.value)

    def test_studies_keep_everything_and_their_order(self, store: SqlStore) -> None:
        created = [store.create_study(name, space(f"study: {name}\n# é 漢\n"), name * 2) for name in ("b", "a")]
        assert store.studies() == created
        assert store.study("b") == created[0]
        assert (created[0].space, created[0].space_version) == (space("study: b\n# é 漢\n"), 1)
        assert created[0].identity == "bb"
        assert created[0].created_at.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - created[0].created_at) < timedelta(seconds=30)

    def test_a_taken_name_is_refused(self, store: SqlStore, study: str) -> None:
        with pytest.raises(StoreError, match=f"study '{study}' is in .* already"):
            store.create_study(study, space(), "")

    def test_the_space_can_be_edited(self, store: SqlStore, study: str) -> None:
        store.create_study("other", space("unchanged"), "")
        first, _ = store.begin_attempt(study, config(1), "search")
        assert store.add_space(study, space("edited")) == 2
        store.begin_attempt(study, config(1), "search")
        second, _ = store.begin_attempt(study, config(2), "search")
        assert [record.space.text for record in store.studies()] == ["edited", "unchanged"]
        assert [record.space_version for record in store.studies()] == [2, 1]
        versions = {trial.number: trial.space_version for trial in store.trials(study)}
        assert versions == {first: 1, second: 2}

    def test_an_outcome_waits_for_a_database_that_is_away(
        self, store: SqlStore, study: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "OUTAGE_PAUSES", (0.0, 0.0))
        _, attempt = store.begin_attempt(study, config(), "search")
        answers_lost = iter([True, False])

        @event.listens_for(store._writing_engine, "commit")
        def lose_the_answer(connection: Connection) -> None:
            if next(answers_lost, False):
                connection.connection.commit()
                raise OperationalError("COMMIT", None, Exception("server closed the connection unexpectedly"))

        store.finish_attempt(attempt, measurement())
        assert store.trials(study)[0].outcome == measurement()

    def test_unknown_study_lists_the_known(self, store: SqlStore, study: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.add_space("nope", space()),
            lambda: store.trials("nope"),
            lambda: store.begin_attempt("nope", config(), "search"),
            lambda: store.interrupt_running("nope"),
        ]
        for call in calls:
            with pytest.raises(StoreError, match=r"study 'nope' is not in .*; it has sft"):
                call()

    def test_a_trial_from_start_to_measurement(self, store: SqlStore, study: str) -> None:
        number, attempt = store.begin_attempt(study, config(), "baseline")
        (trial,) = store.trials(study)
        assert (trial.number, trial.config, trial.source) == (number, config(), "baseline") == (1, config(), "baseline")
        assert trial.fingerprint == config().fingerprint
        assert trial.attempts[0].state is AttemptState.RUNNING
        assert trial.attempts[0].finished_at is None
        assert trial.outcome is None

        store.finish_attempt(attempt, measurement())
        (trial,) = store.trials(study)
        assert trial.attempts[0].state is AttemptState.COMPLETE
        assert trial.outcome == trial.attempts[0].outcome == measurement()
        assert trial.attempts[0].finished_at is not None
        assert trial.attempts[0].finished_at >= trial.attempts[0].started_at
        assert trial.attempts[0].finished_at.utcoffset() == timedelta(0)

    @pytest.mark.parametrize("kind", FailureKind)
    def test_failures_keep_their_kind(self, store: SqlStore, study: str, kind: FailureKind) -> None:
        _, attempt = store.begin_attempt(study, config(), "search")
        store.finish_attempt(attempt, failure(kind))
        (trial,) = store.trials(study)
        assert trial.attempts[0].outcome == failure(kind)
        if kind is FailureKind.INTERRUPTED:
            assert trial.attempts[0].state is AttemptState.INTERRUPTED
            assert trial.outcome is None
        else:
            assert trial.attempts[0].state is AttemptState.FAILED
            assert trial.outcome == failure(kind)

    def test_the_same_config_again_is_another_attempt_of_the_same_trial(self, store: SqlStore, study: str) -> None:
        first = store.begin_attempt(study, config(1), "search")
        store.finish_attempt(first[1], failure(FailureKind.NODE_LOST))
        store.begin_attempt(study, config(2), "search")
        again = store.begin_attempt(study, config(1), "baseline")
        assert again[0] == first[0] == 1
        trials = store.trials(study)
        assert [trial.number for trial in trials] == [1, 2]
        assert [attempt.number for attempt in trials[0].attempts] == [1, 2]
        assert trials[0].source == "search"
        assert trials[0].outcome is None, "the last attempt is running"
        store.finish_attempt(again[1], measurement())
        assert store.trials(study)[0].outcome == measurement()

    def test_studies_number_their_own_trials(self, store: SqlStore, study: str) -> None:
        store.create_study("other", space(), "")
        assert store.begin_attempt(study, config(1), "search")[0] == 1
        assert store.begin_attempt("other", config(1), "search")[0] == 1
        assert store.begin_attempt("other", config(2), "search")[0] == 2
        assert len(store.trials(study)) == 1

    def test_an_attempt_is_finished_once(self, store: SqlStore, study: str) -> None:
        _, attempt = store.begin_attempt(study, config(), "search")
        store.finish_attempt(attempt, measurement())
        with pytest.raises(StoreError, match="is complete, not running"):
            store.finish_attempt(attempt, failure(FailureKind.CRASH))
        with pytest.raises(StoreError, match="has no attempt 999"):
            store.finish_attempt(999, measurement())
        assert store.trials(study)[0].outcome == measurement()

    def test_what_a_crash_left_running_is_interrupted(self, store: SqlStore, study: str) -> None:
        store.create_study("other", space(), "")
        _, elsewhere = store.begin_attempt("other", config(), "search")
        _, done = store.begin_attempt(study, config(1), "search")
        store.finish_attempt(done, measurement())
        for size in (2, 3):
            store.begin_attempt(study, config(size), "search")
        assert store.interrupt_running(study) == 2
        assert store.interrupt_running(study) == 0
        states = [trial.attempts[0].state for trial in store.trials(study)]
        assert states == [AttemptState.COMPLETE, AttemptState.INTERRUPTED, AttemptState.INTERRUPTED]
        assert store.trials(study)[1].attempts[0].finished_at is not None
        store.finish_attempt(elsewhere, measurement())

    def test_all_is_there_after_closing(self, store: SqlStore, study: str, store_url: str) -> None:
        _, attempt = store.begin_attempt(study, config(), "search")
        store.finish_attempt(attempt, measurement())
        before = (store.studies(), store.trials(study))
        store.close()
        with open_store(store_url, create=False) as again:
            assert (again.studies(), again.trials(study)) == before

    def test_not_a_number_is_kept(self, store: SqlStore, study: str) -> None:
        _, attempt = store.begin_attempt(study, config(), "search")
        store.finish_attempt(attempt, measurement(loss=math.nan))
        outcome = store.trials(study)[0].outcome
        assert isinstance(outcome, Measurement)
        assert math.isnan(outcome.ranks[0].losses[0])

    def test_equal_environments_share_a_row(self, store: SqlStore, study: str) -> None:
        for size in (1, 2):
            _, attempt = store.begin_attempt(study, config(size), "search")
            store.finish_attempt(attempt, measurement())
        with store._engine.connect() as connection:
            rows = connection.exec_driver_sql("SELECT count(*), count(DISTINCT environment_id) FROM attempts").one()
            assert tuple(rows) == (2, 1)
            assert connection.exec_driver_sql("SELECT count(*) FROM environments").scalar() == 1
            columns = connection.exec_driver_sql(
                "SELECT state, kind, elapsed_seconds, tokens_per_second_per_gpu, peak_memory_allocated_bytes, log_path"
                " FROM attempts"
            ).first()
            assert columns is not None
            assert tuple(columns) == ("complete", None, 12.5, 1234.5, 60 * 2**30, "logs/1.log")

    def test_attempts_begun_at_once_get_numbers_of_their_own(self, store: SqlStore, study: str) -> None:
        def begin(size: int) -> tuple[int, int]:
            number, attempt = store.begin_attempt(study, config(size), "search")
            store.finish_attempt(attempt, measurement())
            return number, attempt

        with ThreadPoolExecutor(8) as threads:
            begun = list(threads.map(begin, range(1, 25)))
        assert sorted(number for number, _ in begun) == list(range(1, 25))
        assert len({attempt for _, attempt in begun}) == 24

    def test_two_tuners_may_open_one_new_store_at_once(self, store_url: str) -> None:
        with ThreadPoolExecutor(4) as threads:
            stores = list(threads.map(lambda _: open_store(store_url, create=True), range(4)))
        stores[0].create_study("sft", space(), "")
        assert all(store.study("sft") is not None for store in stores)
        for store in stores:
            store.close()

    def test_trials_takes_a_constant_number_of_queries(self, store: SqlStore, study: str) -> None:
        statements: list[str] = []
        event.listen(store._engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
        counts = []
        for size in range(1, 13):
            store.begin_attempt(study, config(size), "search")
            statements.clear()
            store.trials(study)
            counts.append(len(statements))
        assert len(set(counts)) == 1, counts

    def test_config_round_trip(self, store: SqlStore, study: str) -> None:
        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
        @given(configs)
        def round_trip(drawn: TrialConfig) -> None:
            number, _ = store.begin_attempt(study, drawn, "search")
            found = store.trials(study)[number - 1]
            assert found.config == drawn
            assert found.fingerprint == drawn.fingerprint

        round_trip()

    def test_the_password_is_in_no_message(self, store: SqlStore, store_url: str) -> None:
        url = store_url.replace("postgres@", "postgres:hush@")
        with open_store(url, create=True) as other, pytest.raises(StoreError) as caught:
            other.trials("nope")
        assert "hush" not in str(caught.value)


def _open_and_add(arguments: tuple[str, int]) -> int:
    url, size = arguments
    with open_store(url, create=True) as store:
        if store.study("sft") is None:
            try:
                store.create_study("sft", space(), "")
            except StoreError:
                assert store.study("sft") is not None  # another process was first
        number, attempt = store.begin_attempt("sft", config(size), "search")
        store.finish_attempt(attempt, measurement())
        return number


def test_processes_share_one_new_sqlite_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/autotune.db"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        numbers = pool.map(_open_and_add, [(url, size) for size in range(1, 7)], chunksize=1)
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]


def test_ten_thousand_trials_load_within_five_seconds(tmp_path: Path) -> None:
    from sqlalchemy import insert

    from autotune.store.tables import Attempt, Trial

    with open_store(f"sqlite:///{tmp_path}/autotune.db", create=True) as store:
        store.create_study("sft", space(), "")
        outcome, now = measurement(ranks=8).to_dict(), datetime.now(UTC)
        many = [config(size) for size in range(1, 10_001)]
        with store._writing_engine.begin() as connection:
            connection.execute(
                insert(Trial),
                [
                    {"id": number, "study_id": 1, "number": number, "fingerprint": one.fingerprint}
                    | {"config": one.to_dict(), "source": "search"}
                    for number, one in enumerate(many, 1)
                ],
            )
            connection.execute(
                insert(Attempt),
                [
                    {"trial_id": number, "number": 1, "state": "complete", "started_at": now, "finished_at": now}
                    | {"outcome": outcome}
                    for number in range(1, 10_001)
                ],
            )
        start = time.process_time()  # SQLite works inside this process; a busy machine does not count
        trials = store.trials("sft")
        seconds = time.process_time() - start
    assert [trial.config for trial in trials] == many
    assert seconds <= 5


def test_sqlite_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pragmas(url: str) -> list[object]:
        with open_store(url, create=True) as store, store._engine.connect() as connection:
            names = ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
            return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    url = f"sqlite:///{tmp_path}/deep/er/autotune.db"
    assert pragmas(url) == ["wal", 1, 2, 60_000]
    monkeypatch.setattr("autotune.store.connect.journal_mode", lambda path: "delete")
    assert pragmas(url) == ["delete", 1, 2, 60_000], "a file that moved to a network disk leaves WAL"


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(
            (kind, "delete")
            for kind in ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "9p", "ceph")
        ),
        *((kind, "delete") for kind in ("fuse.sshfs", "fuse.glusterfs", "fuse", "NFS4")),
        *((kind, "wal") for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fuseblk", "")),
    ],
)
def test_journal_mode_by_file_system(kind: str, mode: str, tmp_path: Path) -> None:
    mounts = [("/", "ext4"), (str(tmp_path.resolve()), kind), (f"{tmp_path.resolve()}/other", "nfs4")]
    assert journal_mode(tmp_path / "new" / "autotune.db", mounts) == mode


def test_journal_mode_takes_the_deepest_and_latest_mount() -> None:
    mounts = [("/", "ext4"), ("/data", "nfs4"), ("/data/local", "ext4"), ("/data2", "xfs"), ("/data2", "nfs")]
    assert journal_mode(Path("/data/a.db"), mounts) == "delete"
    assert journal_mode(Path("/data/local/a.db"), mounts) == "wal"
    assert journal_mode(Path("/database/a.db"), mounts) == "wal"
    assert journal_mode(Path("/data2/a.db"), mounts) == "delete"
    assert journal_mode(Path("/nowhere/a.db"), []) == "wal"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("autotune.db", "is no database URL"),
        ("", "is no database URL"),
        ("postgresql://bob:s3cret@host:port/db", "is no database URL"),
        ("mysql://bob:s3cret@host/db", "only sqlite and postgresql"),
        ("sqlite://", "would be lost"),
        ("sqlite:///:memory:", "would be lost"),
        ("postgresql+nosuch://bob:s3cret@host/db", "cannot be used"),
        ("postgresql+asyncpg://bob:s3cret@host/db", "asyncpg"),
        ("postgresql://bob:s3cret@127.0.0.1:1/db?connect_timeout=2", "cannot be used"),
        ("postgresql://bob@127.0.0.1:1/db?password=s3cret", "cannot be used"),
        ("sqlite:////dev/null/folder/autotune.db", "cannot be made"),
    ],
)
def test_bad_url_is_one_sentence_without_the_password(url: str, complaint: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(url, create=True)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database\n" * 100)
    with open_store(f"sqlite:///{tmp_path}/torn.db", create=True) as store:
        store.create_study("sft", space("x" * 100_000), "")
    sqlite3.connect(tmp_path / "torn.db").execute("PRAGMA wal_checkpoint(TRUNCATE)").connection.close()
    whole = (tmp_path / "torn.db").read_bytes()
    (tmp_path / "torn.db").write_bytes(whole[:4096] + os.urandom(8192))
    (tmp_path / "folder.db").mkdir()
    for name in ("text.db", "torn.db", "folder.db"):
        for create in (True, False):
            with pytest.raises(StoreError, match=f"{name} cannot be used") as caught:
                open_store(f"sqlite:///{tmp_path}/{name}", create=create).studies()
            assert "\n" not in str(caught.value)


def test_missing_file_is_not_made_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        open_store(f"sqlite:///{tmp_path}/no/autotune.db", create=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("postgresql://bob:s3cret@host/db", "postgresql://bob:***@host/db"),
        ("postgresql://bob:s3c@r/e:t@host/db", "postgresql://bob:***@host/db"),
        ("postgresql://bob@host/db?password=s3cret&x=1", "postgresql://bob@host/db?password=***&x=1"),
        ("postgresql://bob@host/db", "postgresql://bob@host/db"),
        ("sqlite:///a/b@c.db", "sqlite:///a/b@c.db"),
        ("not a url", "not a url"),
    ],
)
def test_mask_url(url: str, masked: str) -> None:
    assert mask_url(url) == masked
