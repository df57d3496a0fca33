"""Whether the kernel killed a process of ours because the host ran out of memory.

SIGKILL does not say who sent it. The memory cgroup that we run in counts its kills; where the counter rose while a
process died of SIGKILL, memory is the reason. The counter is the cgroup's: with several gangs at a time the wrong one
may be blamed, if it dies of SIGKILL in the same moment.
"""

from pathlib import Path

_HIERARCHY = Path("/sys/fs/cgroup")


def oom_kills(process: str = "self", hierarchy: Path = _HIERARCHY, proc: Path = Path("/proc")) -> int | None:
    """Processes that the kernel has killed in our memory cgroup so far; None where it cannot be read."""
    try:
        memberships = (proc / process / "cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if "memory" in controllers.split(","):  # version 1
            # In a container the path is often the host's, and the container's own cgroup is mounted at the top.
            files = [hierarchy / "memory" / inside / "memory.oom_control", hierarchy / "memory" / "memory.oom_control"]
        elif not controllers:  # version 2
            files = [hierarchy / inside / "memory.events", hierarchy / "memory.events"]
        else:
            continue
        for file in files:
            count = _counter(file)
            if count is not None:
                return count
    return None


def _counter(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(" ")
        if key == "oom_kill":
            return int(value)
    return None
