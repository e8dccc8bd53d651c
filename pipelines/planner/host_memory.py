"""How much memory this process may still take on the CPU, as the system and its control group say.

What only caches files counts as free: a checkpoint that was just downloaded fills all memory with
its pages, and they make way. Knows no plan and no device.
"""

import os
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")

FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""A hierarchy's folder, empty for version 2's: its files of the limit and of what is taken, and
what `memory.stat` calls the cached pages that make way."""


def free_memory() -> int:
    """Bytes; never less than 0."""
    return max(0, min([_available(), *_left_to_groups()]))


def _available() -> int:
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:  # not Linux: what is empty now
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = dict(line.split(":", 1) for line in lines)
    return 1024 * int(sizes["MemAvailable"].split()[0])


def _left_to_groups() -> Iterator[int]:
    """What each control group around this process has left of its limit, where it has one.

    In a container the names of groups may be those of its host, and the container's own is the top.
    """
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers not in FILES:
            continue
        path = Path(name)
        for group in (path, *path.parents):
            left = _left(GROUPS / controllers / group.relative_to("/"), *FILES[controllers])
            if left is not None:
                yield left


def _left(folder: Path, limit: str, taken: str, cached: str) -> int | None:
    """What a group's folder says; None without a limit."""
    try:
        most = int((folder / limit).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return most - int((folder / taken).read_text()) + int(stat.get(cached, 0))
    except (OSError, ValueError):  # there is no such group, or it says "max"
        return None
