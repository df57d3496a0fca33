from pathlib import Path

import pytest

from autotune.trial.host_memory import oom_kills


def machine(root: Path, membership: str, counters: dict[str, str]) -> tuple[Path, Path]:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(membership)
    for name, text in counters.items():
        file = root / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root / "cgroup", root / "proc"


@pytest.mark.parametrize(
    ("membership", "counters", "expected"),
    [
        ("0::/job\n", {"job/memory.events": "low 0\noom 2\noom_kill 2\noom_group_kill 0\n"}, 2),
        ("0::/\n", {"memory.events": "oom_kill 1\n"}, 1),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.oom_control": "under_oom 0\noom_kill 3\n"}, 3),
        ("4:cpu,memory:/host/path\n", {"memory/memory.oom_control": "oom_kill 4\n"}, 4),
        ("0::/job\n", {}, None),
        ("3:cpu:/\n", {"memory.events": "oom_kill 9\n"}, None),
    ],
)
def test_the_counter_of_our_cgroup(
    tmp_path: Path, membership: str, counters: dict[str, str], expected: int | None
) -> None:
    hierarchy, proc = machine(tmp_path, membership, counters)
    assert oom_kills(hierarchy=hierarchy, proc=proc) == expected


def test_a_machine_without_cgroups_has_none(tmp_path: Path) -> None:
    assert oom_kills(hierarchy=tmp_path, proc=tmp_path) is None
