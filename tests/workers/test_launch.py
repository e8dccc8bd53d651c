"""A process's place, given the environment set by the supervisor or a launcher."""

import pytest

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from workers.process import launch
from workers.process.launch import Place, launched_place, supervised_place

PLAIN = Model("plain", "/nowhere")
GROUP = Model("group", "/nowhere", placement="context_parallel", ulysses=2)
SPLIT = Model("split", "/nowhere", placement="split")


def environ(rank: int, size: int, local: int, **others: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local), **others}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two."""
    monkeypatch.setattr(launch, "accelerators", lambda: ["cuda:0", "cuda:1"])


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any."""
    monkeypatch.setattr(launch, "accelerators", lambda: ["cpu"])


def test_no_place_without_a_launcher() -> None:
    assert launched_place(PLAIN, 0, {}) is None
    assert launched_place(None, 0, {"RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.usefixtures("gpus")
def test_each_replica_process_is_a_worker() -> None:
    place = launched_place(PLAIN, 0, environ(rank=3, size=4, local=1))
    assert place == Place("cuda:1", index=3, is_launched=True)


@pytest.mark.usefixtures("gpus")
def test_each_group_process_is_a_rank() -> None:
    place = launched_place(GROUP, 0, environ(rank=1, size=2, local=0))
    assert place == Place("cuda:0", 0, rank=1, size=2, is_launched=True)


@pytest.mark.usefixtures("cpu")
def test_all_on_cpu_without_accelerators() -> None:
    place = launched_place(GROUP, 0, environ(rank=1, size=2, local=1))
    assert place is not None
    assert place.device == "cpu"


@pytest.mark.usefixtures("gpus")
def test_cpu_can_be_requested() -> None:
    place = launched_place(PLAIN, 0, environ(0, 2, 0, ACCELERATE_USE_CPU="true"))
    assert place is not None
    assert place.device == "cpu"


@pytest.mark.usefixtures("gpus")
def test_split_worker_starts_at_its_first_device() -> None:
    place = launched_place(SPLIT, 0, environ(rank=1, size=2, local=1))
    assert place is not None
    assert place.device == "cuda:0"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("model", "where", "sentence"),
    [
        (None, environ(0, 2, 0), "--model"),
        (GROUP, environ(0, 3, 0), "takes 2 processes, but the launcher started 3"),
        (PLAIN, environ(2, 3, 2), "no device for process 3 of this machine"),
    ],
)
def test_invalid_launch_is_an_error(
    model: Model | None, where: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        launched_place(model, 0, where)


def test_leader_reads_its_followers_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.GROUP, "12=cuda:1")
    place = supervised_place(GROUP, "cuda:0", 0, {"RANK": "0", "WORLD_SIZE": "2"})
    assert [(rank.rank, rank.device) for rank in place.group] == [(0, "cuda:0"), (1, "cuda:1")]
    assert place.group[1].pid == 12
    assert supervised_place(PLAIN, "cuda:0", 0, environ(1, 2, 1)).group == ()
