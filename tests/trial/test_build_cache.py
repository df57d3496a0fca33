import os
import time
from pathlib import Path

import pytest

from autotune.trial.build_cache import BuildCache, open_build_cache


def a_lock(folder: Path) -> Path:
    lock = folder / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    return lock


def test_locks_left_by_the_dead_are_removed_at_the_start(tmp_path: Path) -> None:
    lock = a_lock(tmp_path)
    (lock.parent / "cpu_adam.so").touch()
    BuildCache(tmp_path).close()
    assert not lock.exists()
    assert (lock.parent / "cpu_adam.so").exists()


def test_a_lock_is_kept_while_another_pool_lives(tmp_path: Path) -> None:
    first = BuildCache(tmp_path)
    lock = a_lock(tmp_path)
    second = BuildCache(tmp_path)
    assert second.sweep() == []
    assert first.sweep() == []
    assert lock.exists()
    first.close()
    assert second.sweep() == [lock]
    second.close()


def test_a_failed_sweep_keeps_our_own_claim(tmp_path: Path) -> None:
    first, second = BuildCache(tmp_path), BuildCache(tmp_path)
    first.sweep()
    third = BuildCache(tmp_path)
    second.close()
    lock = a_lock(tmp_path)
    assert third.sweep() == []
    assert lock.exists()
    first.close()
    third.close()


def test_in_a_folder_of_the_user_only_locks_of_the_killed_gang_are_removed(tmp_path: Path) -> None:
    theirs, ours = a_lock(tmp_path / "a"), a_lock(tmp_path / "b")
    os.utime(theirs, (1, 1))
    cache = BuildCache(tmp_path, owned=False)
    assert theirs.exists()
    assert ours.exists()
    assert cache.sweep(since=time.time() - 60) == [ours]
    assert theirs.exists()
    cache.close()


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = open_build_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert own.folder.is_relative_to(tmp_path / "autotune" / "torch_extensions")
    assert "torch" in own.folder.name
    own.close()
    named = open_build_cache({"TORCH_EXTENSIONS_DIR": str(tmp_path / "mine"), "XDG_CACHE_HOME": str(tmp_path)})
    assert named.folder == tmp_path / "mine"
    named.close()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    at_home = open_build_cache({})
    assert at_home.folder.is_relative_to(tmp_path / "home" / ".cache")
    at_home.close()


def test_without_a_writable_home_the_folder_is_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = open_build_cache({"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert cache.folder.is_relative_to(tmp_path / f"autotune-{os.getuid()}")
    cache.close()
