"""A process's place, by what the supervisor or a launcher says in its environment."""

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
    """A machine of two."""
    monkeypatch.setattr(launch, "accelerators", lambda: ["cuda:0", "cuda:1"])


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of none."""
    monkeypatch.setattr(launch, "accelerators", lambda: ["cpu"])


def test_without_a_launcher_there_is_no_place() -> None:
    assert launched_place(PLAIN, 0, {}) is None
    assert launched_place(None, 0, {"RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.usefixtures("gpus")
def test_each_process_of_a_replica_is_a_worker_of_its_own() -> None:
    place = launched_place(PLAIN, 0, environ(rank=3, size=4, local=1))
    assert place == Place("cuda:1", index=3, is_launched=True)


@pytest.mark.usefixtures("gpus")
def test_each_process_of_a_group_is_a_rank() -> None:
    place = launched_place(GROUP, 0, environ(rank=1, size=2, local=0))
    assert place == Place("cuda:0", 0, rank=1, size=2, is_launched=True)


@pytest.mark.usefixtures("cpu")
def test_without_accelerators_all_are_on_the_cpu() -> None:
    place = launched_place(GROUP, 0, environ(rank=1, size=2, local=1))
    assert place is not None
    assert place.device == "cpu"


@pytest.mark.usefixtures("gpus")
def test_the_cpu_can_be_asked_for() -> None:
    place = launched_place(PLAIN, 0, environ(0, 2, 0, ACCELERATE_USE_CPU="true"))
    assert place is not None
    assert place.device == "cpu"


@pytest.mark.usefixtures("gpus")
def test_a_split_worker_begins_at_its_first_device() -> None:
    place = launched_place(SPLIT, 0, environ(rank=1, size=2, local=1))
    assert place is not None
    assert place.device == "cuda:0"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("model", "where", "sentence"),
    [
        (None, environ(0, 2, 0), "--model"),
        (GROUP, environ(0, 3, 0), "takes 2 processes, and the launcher started 3"),
        (PLAIN, environ(2, 3, 2), "process 3 of this machine has no device"),
    ],
)
def test_what_cannot_work_is_refused(
    model: Model | None, where: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        launched_place(model, 0, where)


def test_the_supervisor_tells_a_leader_of_its_followers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.GROUP, "12=cuda:1")
    place = supervised_place(GROUP, "cuda:0", 0, {"RANK": "0", "WORLD_SIZE": "2"})
    assert [(one["rank"], one["device"]) for one in place.group] == [(0, "cuda:0"), (1, "cuda:1")]
    assert place.group[1]["pid"] == 12
    assert supervised_place(PLAIN, "cuda:0", 0, environ(1, 2, 1)).group == []
