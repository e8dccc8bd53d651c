"""Which workers a catalog gets on a machine's devices, and how a group's ranks are restarted."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from jobs.catalog import Catalog, load_catalog
from jobs.errors import ConfigurationError, StorageUnavailable, UnknownModel
from jobs.queue.store import Store
from tests.waiting import PATIENCE, wait_until
from workers.process import supervisor
from workers.process.refusals import Ground, Notices, ground_of
from workers.process.supervisor import Post, Supervisor, posts
from workers.settings import WorkerSettings

GPUS = [f"cuda:{i}" for i in range(4)]
PAIR = 'placement = "context_parallel"\nulysses = 2\nworkers = 1'
SPLIT = 'placement = "split"\ndevices = ["cuda:0", "cuda:1"]'


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """One worker per device, two workers, one with its own device, a group of two, a split."""
    path = tmp_path / "models.toml"
    path.write_text(
        '[models.each]\npath = "./a"\n'
        '[models.two]\npath = "./b"\nworkers = 2\n'
        '[models.own]\npath = "./c"\nworkers = 1\ndevices = ["cuda:3"]\n'
        '[models.group]\npath = "./d"\nplacement = "context_parallel"\nulysses = 2\n'
        '[models.split]\npath = "./e"\nplacement = "split"\ndevices = ["cuda:0", "cuda:1"]\n'
        '[models.named]\npath = "./f"\nplacement = "pipelined"\nstages = 2\n'
        'devices = ["cuda:1", "cuda:2"]\n'
    )
    return load_catalog(path)


def devices(places: list[Post], model: str) -> list[tuple[str, ...]]:
    return [place.devices for place in places if place.model == model]


def test_one_worker_per_device_by_default(catalog: Catalog) -> None:
    places = posts(catalog, GPUS[:2])
    assert [p for p in places if p.model == "each"] == [
        Post("each", 0, ("cuda:0",)),
        Post("each", 1, ("cuda:1",)),
    ]
    assert devices(places, "two") == [("cuda:0",), ("cuda:1",)]
    assert devices(places, "own") == [("cuda:3",)]


def test_count_and_model_override_the_catalog(catalog: Catalog) -> None:
    expected = [Post("two", i, ("cpu",)) for i in range(3)]
    assert posts(catalog, ["cpu"], only="two", count=3) == expected


def test_unknown_model_error_lists_known_ones(catalog: Catalog) -> None:
    with pytest.raises(UnknownModel, match="each, two, own"):
        posts(catalog, ["cpu"], only="three")


def test_one_group_per_set_of_devices(catalog: Catalog) -> None:
    dealt = posts(catalog, GPUS, only="group")
    assert devices(dealt, "group") == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]
    assert devices(posts(catalog, GPUS), "named") == [("cuda:1", "cuda:2")]
    assert devices(posts(catalog, GPUS), "split") == [("cuda:0",)]


def test_group_shares_the_cpu(catalog: Catalog) -> None:
    assert posts(catalog, ["cpu"], only="group") == [Post("group", 0, ("cpu", "cpu"))]


def test_group_larger_than_the_machine_gets_missing_devices(catalog: Catalog) -> None:
    assert devices(posts(catalog, GPUS[:1], only="group"), "group") == [("cuda:0", "cuda:1")]


@pytest.mark.parametrize(
    ("entries", "count", "dealt"),
    [
        (["workers = 1"] * 3, 3, ["0", "1", "2"]),
        (["workers = 1"] * 5, 5, ["0", "1", "2", "3", "4"]),
        (["workers = 1"] * 4, 3, ["0", "1", "2", "0"]),
        (["workers = 2"] * 2, 3, ["0", "1", "2", "0"]),
        (['devices = ["cuda:0"]', *["workers = 1"] * 2], 3, ["0", "1", "2"]),
        (["workers = 1", PAIR, "workers = 1"], 4, ["0", "2 3", "1"]),
        ([PAIR.replace("workers = 1", "workers = 2")], 3, ["0 1", "2 0"]),
        ([SPLIT, "workers = 1"], 3, ["0", "2"]),
    ],
)
def test_models_get_the_devices_that_are_still_free(
    tmp_path: Path, entries: list[str], count: int, dealt: list[str]
) -> None:
    path = tmp_path / "models.toml"
    path.write_text(
        "\n".join(f'[models.m{i}]\npath = "./m"\n{fields}' for i, fields in enumerate(entries))
    )
    places = posts(load_catalog(path), [f"cuda:{i}" for i in range(count)])
    assert [" ".join(place.devices).replace("cuda:", "") for place in places] == dealt


@pytest.mark.parametrize(
    "fields",
    [
        'placement = "context_parallel"\nulysses = 3\ndevices = ["cuda:2", "cuda:3"]',
        'placement = "pipelined"\nstages = 3\ndevices = ["cuda:0", "cpu"]',
    ],
)
def test_group_only_uses_devices_of_its_entry(tmp_path: Path, fields: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(f'[models.m]\npath = "./m"\n{fields}')
    with pytest.raises(ConfigurationError, match="'m': devices lists 2 for a group of 3 ranks"):
        posts(load_catalog(path), GPUS)


def test_ranks_can_share_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(
        '[models.m]\npath = "./m"\nplacement = "pipelined"\nstages = 3\ndevices = ["cpu"]'
    )
    assert posts(load_catalog(path), GPUS) == [Post("m", 0, ("cpu", "cpu", "cpu"))]


def test_too_few_devices_exits_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(f'[models.m]\npath = "./m"\n{PAIR}\ndevices = ["cuda:2"]')
    done = subprocess.run(
        [sys.executable, "-m", "workers"],
        env={**os.environ, "IMAGEMILL_DATA": str(tmp_path), "IMAGEMILL_MODELS": str(path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "model 'm': devices lists 1 for a group of 2 ranks\n",
    )


def test_group_on_mig_slices_is_an_error(catalog: Catalog) -> None:
    slices = ["MIG-1", "MIG-2"]
    assert devices(posts(catalog, slices, only="each"), "each") == [("MIG-1",), ("MIG-2",)]
    with pytest.raises(ConfigurationError, match="'group': a group of 2 ranks can't run on MIG"):
        posts(catalog, slices, only="group")


RANK = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
def ended(*_):
    (folder / "drained").touch()
    sys.exit(71)
signal.signal(signal.SIGTERM, ended if rank == "0" else signal.SIG_IGN)
facts = [os.environ[n] for n in ("WORLD_SIZE", "MASTER_PORT")] + [os.environ.get("IMAGEMILL_GROUP")]
(folder / f"{rank}.{os.getpid()}").write_text(repr(facts))
if (folder / "refuse").exists() and rank == "1":
    while not any(folder.glob("0.*")):  # the leader is ended once this rank has exited
        time.sleep(0.01)
    sys.exit(int((folder / "refuse").read_text()))
while True:
    signal.pause()
"""


def unreachable() -> Store:
    raise StorageUnavailable("there is no queue server")


@contextmanager
def group_of_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Supervise a group whose ranks only record in `folder` that they're running."""
    monkeypatch.setattr(supervisor.lifeline, "watch", lambda _: False)
    monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, str(folder / "rank.py"), str(folder)]
    settings = WorkerSettings(models=folder / "models.toml")
    posts = [Post("group", 0, ("cpu", "cpu"))]
    group_supervisor = Supervisor(posts, settings, Notices(unreachable), command)
    thread = threading.Thread(target=group_supervisor.run)
    thread.start()
    try:
        yield
    finally:
        group_supervisor.stop()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not any(psutil.pid_exists(pid) for pid in pids(folder, 0) + pids(folder, 1))


def pids(folder: Path, rank: int) -> list[int]:
    """Process ids that this rank has had so far."""
    return [int(path.suffix[1:]) for path in folder.glob(f"{rank}.*")]


@pytest.mark.parametrize("rank", [0, 1])
def test_group_restarts_when_a_rank_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(supervisor, "GROUP_GRACE_SECONDS", PATIENCE)
    with group_of_two(tmp_path, monkeypatch):
        wait_until(lambda: pids(tmp_path, 0) and pids(tmp_path, 1))
        [[leader], [follower]] = first = [pids(tmp_path, 0), pids(tmp_path, 1)]
        facts = tmp_path / f"0.{leader}"
        wait_until(lambda: f"{follower}=cpu" in facts.read_text())
        os.kill(first[rank][0], signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(leader) and not psutil.pid_exists(follower))
        assert (tmp_path / "drained").exists() == (rank == 1)
        wait_until(lambda: len(pids(tmp_path, 0)) == len(pids(tmp_path, 1)) == 2)


def test_group_restarts_after_a_temporary_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "refuse").write_text("1")
    with group_of_two(tmp_path, monkeypatch):
        wait_until(lambda: len(pids(tmp_path, 1)) >= 3)


@pytest.mark.parametrize("code", ["2", "66"])
def test_refused_group_restarts_when_its_entry_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    looks: list[Ground] = []

    def looked(catalog: Path, name: str) -> Ground:
        looks.append(ground_of(catalog, name))
        return looks[-1]

    monkeypatch.setattr(supervisor, "ground_of", looked)
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.01)
    (tmp_path / "refuse").write_text(code)
    with group_of_two(tmp_path, monkeypatch):
        wait_until(lambda: len(looks) >= 6)
        assert len(pids(tmp_path, 1)) == 1
        (tmp_path / "refuse").unlink()
        (tmp_path / "models.toml").write_text('[models.group]\npath = "./m"\n')
        wait_until(lambda: len(pids(tmp_path, 1)) == 2 and len(pids(tmp_path, 0)) == 2)
