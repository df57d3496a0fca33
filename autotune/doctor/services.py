"""Ray and the store: does what the options name answer?"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autotune.doctor.check import Finding, fail, ok, warn
from autotune.errors import ClusterError, StoreError

_WAL_VERSIONS = b"\x02\x02"
"""Bytes 18 and 19 of a SQLite file (sqlite.org/fileformat.html, 1.3.3)."""

Ask = Callable[..., dict[str, Any]]


def check_ray(address: str | None, ask: Ask, environment: Mapping[str, str] = os.environ) -> Finding:
    """The cluster answers: by a connection if `--address` names it, at its port alone if only RAY_ADDRESS does.

    Args:
        address: of `--address`.
        ask: `probe.ask`.
        environment: where RAY_ADDRESS and the token are looked up.
    """
    from autotune.search.address import require_reachable

    known = address or environment.get("RAY_ADDRESS")
    token = _token(environment)
    if not known:
        return ok("no address given; `autotune tune` starts Ray here, with a token of its own")
    try:
        require_reachable(known)
    except ClusterError as error:
        return fail(str(error).partition(";")[0], "start the cluster, or correct the address")
    if address is None:
        return ok(f"{known} of RAY_ADDRESS can be reached, {token}; --address {known} asks it for its nodes")
    answer = ask("cluster", address, seconds=120.0)
    if "error" in answer:
        return fail(
            answer["error"].partition(";")[0],
            "check the address, RAY_AUTH_TOKEN, and that both sides run one version of Ray",
        )
    gpus = sum(node.get("GPU", 0) for node in answer["nodes"])
    cores = sum(node.get("CPU", 0) for node in answer["nodes"])
    return ok(f"{address} answers, {token}; nodes {len(answer['nodes'])}, GPUs {gpus:g}, CPUs {cores:g}")


def _token(environment: Mapping[str, str]) -> str:
    if environment.get("RAY_AUTH_TOKEN"):
        return "with the token of RAY_AUTH_TOKEN"
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return f"with the token in {path}" if path.is_file() else "without a token"


def check_store(url: str) -> Finding:
    """The database can be used, and has this version's schema. It is neither made nor upgraded."""
    from autotune.store.connect import connect, journal_mode, mask_url, parse_url, reported, sqlite_path
    from autotune.store.migrate import is_current, is_known, schema_revision

    shown = mask_url(url)
    try:
        parsed = parse_url(url)
        path = sqlite_path(parsed)
        if path is not None and (problem := _file_problem(shown, path) or _log_problem(shown, path)):
            return problem
        if path is not None and (not path.exists() or not path.stat().st_size):
            return _on_its_disk(path, journal_mode(path), f"{shown}: empty; `autotune tune` begins it")
        engine = connect(parsed)
        try:
            with reported(shown), engine.connect() as connection:
                revision = schema_revision(connection)
                current, known = is_current(connection), is_known(connection)
        finally:
            engine.dispose()
    except StoreError as error:
        what, _, remedy = str(error).partition("; ")
        return fail(what, remedy or "name another database with --store")
    if revision is None:
        return warn(
            f"{shown}: holds nothing of Autotune's", "correct --store, or let `autotune tune` begin a study there"
        )
    if current:
        return _on_its_disk(path, "" if path is None else journal_mode(path), f"{shown}: schema {revision}")
    if known:
        return warn(f"{shown}: schema {revision} of an earlier version", "`autotune tune` upgrades it; copy it before")
    return fail(f"{shown}: schema {revision} of a later version", "upgrade Autotune, or name another database")


def _file_problem(shown: str, path: Path) -> Finding | None:
    nearest = next(there for there in (path, *path.parents) if there.exists())
    if path.is_dir() or (nearest != path and not nearest.is_dir()):
        return fail(f"{shown}: {nearest} is in the way", "name another file with --store")
    # SQLite keeps its journal beside the file.
    for needed in {nearest, path.parent if path.exists() else nearest}:
        if not os.access(needed, os.W_OK):
            return fail(f"{shown}: {needed} is not writable", "name a writable place with --store")
    return None


def _log_problem(shown: str, path: Path) -> Finding | None:
    """A database with a write-ahead log on a file system that spans machines: it loses writes without a word."""
    from autotune.store.connect import journal_mode

    if journal_mode(path) == "wal" or not path.exists():
        return None
    with path.open("rb") as file:
        header = file.read(20)
    if header[18:20] != _WAL_VERSIONS:
        return None
    return fail(
        f"{shown}: is on a network file system and uses a write-ahead log (WAL), which is unsafe there",
        f"on the one machine that has it open, run sqlite3 {path} 'PRAGMA journal_mode=DELETE', or move it to a local"
        " disk, or use postgresql://",
    )


def _on_its_disk(path: Path | None, mode: str, found: str) -> Finding:
    if path is not None and mode != "wal":
        return warn(
            f"{found}; on a network file system, where SQLite is slow and locks can fail",
            "keep it on a local disk, or use postgresql://",
        )
    return ok(found)
