"""Available memory: cached file pages count, and a control group's limit applies."""

import pytest

from pipelines.placements.split import SPARE, rooms_of
from pipelines.planner import host_memory
from tests.pipelines.serving import entry

MIB, GIB = 2**20, 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 64 GiB, 2 of them empty and 40 available, and its control groups."""
    (tmp_path / "proc/self").mkdir(parents=True)
    sizes = {"MemTotal": 64, "MemFree": 2, "MemAvailable": 40}
    lines = [f"{name}:   {size * MIB} kB\n" for name, size in sizes.items()]
    (tmp_path / "proc/meminfo").write_text("".join(lines) + "HugePages_Total:       0\n")
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")

    def groups(cgroup, **folders):
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for folder, files in folders.items():
            place = tmp_path / "groups" / folder.replace("__", "/")
            place.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (place / name).write_text(f"{text}\n")

    return groups


def version_2(limit, current, cached):
    return {
        "memory.max": limit,
        "memory.current": current,
        "memory.stat": f"anon 5\ninactive_file {cached}",
    }


def version_1(limit, usage, cached):
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": usage,
        "memory.stat": f"inactive_file 0\ntotal_inactive_file {cached}",
    }


def test_cached_file_pages_count_as_available(machine):
    assert host_memory.available_memory() == 40 * GIB
    model = entry("", placement="split")
    assert rooms_of(model, ["cpu"])["cpu"] == int(SPARE * 40 * GIB)


@pytest.mark.parametrize(
    ("cgroup", "folders", "expected"),
    [
        ("0::/\n", {"": version_2(16 * GIB, 12 * GIB, 9 * GIB)}, 13 * GIB),
        ("0::/\n", {"": version_2("max", 12 * GIB, 0)}, 40 * GIB),
        ("0::/a/b\n", {"a": version_2(8 * GIB, 0, 0), "a__b": version_2("max", 0, 0)}, 8 * GIB),
        ("3:cpu:/x\n2:memory:/x\n0::/\n", {"memory__x": version_1(4 * GIB, GIB, 0)}, 3 * GIB),
        ("2:memory:/hosts/name\n", {"memory": version_1(4 * GIB, GIB, GIB)}, 4 * GIB),
        ("2:memory:/\n", {"memory": version_1(2**63 - 4096, GIB, 0)}, 40 * GIB),
        ("0::/\n", {"": version_2(GIB, 2 * GIB, 0)}, 0),
    ],
)
def test_a_control_groups_limit_applies(machine, cgroup, folders, expected):
    machine(cgroup, **folders)
    assert host_memory.available_memory() == expected
