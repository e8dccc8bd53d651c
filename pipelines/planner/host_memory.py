"""How much CPU memory this process can still use, according to the system and its control group.

Cached file pages count as available, because the kernel evicts them: a checkpoint that was just
downloaded fills all memory with its pages. This module doesn't depend on plans or devices.
"""

import os
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")

FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""A hierarchy's folder ("" for cgroup v2) -> its files with the limit and the usage, and the key in
`memory.stat` of the cached pages that can be evicted."""


def available_memory() -> int:
    """Bytes; never less than 0."""
    return max(0, min([_system_available(), *_group_available()]))


def _system_available() -> int:
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:  # not Linux: count empty pages only
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = dict(line.split(":", 1) for line in lines)
    return 1024 * int(sizes["MemAvailable"].split()[0])


def _group_available() -> Iterator[int]:
    """The bytes left below the limit of each control group that contains this process.

    In a container the group's name may be the host's, while the container's own group is mounted at
    the root, so all parents are tried.
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
            size = _below_limit(GROUPS / controllers / group.relative_to("/"), *FILES[controllers])
            if size is not None:
                yield size


def _below_limit(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    """The bytes left below a group's limit; None without a limit."""
    try:
        limit_bytes = int((folder / limit).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit_bytes - int((folder / usage).read_text()) + int(stat.get(cached, 0))
    except (OSError, ValueError):  # the group doesn't exist, or its limit is "max"
        return None
