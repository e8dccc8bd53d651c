"""A rank that can't start reports why, whatever the error."""

from pathlib import Path

import pytest

from jobs.catalog import Model
from jobs.errors import ConfigurationError, GroupLost
from jobs.queue.store import Store
from jobs.runtime.embedded_queue import EmbeddedServer
from workers.process import follower
from workers.process.launch import EXIT_CONFIGURATION, EXIT_FAILED, EXIT_GROUP_LOST, Place
from workers.settings import WorkerSettings

MODEL = Model("group", "/nowhere", placement="context_parallel", ulysses=2)


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (TypeError("no such argument"), EXIT_FAILED, "rank 1: TypeError: no such argument"),
        (AttributeError("no to_q"), EXIT_FAILED, "rank 1: AttributeError: no to_q"),
        (KeyError("blocks.3"), EXIT_FAILED, "rank 1: KeyError: 'blocks.3'"),
        (AssertionError(), EXIT_FAILED, "rank 1: AssertionError: "),
        (ConfigurationError("ring has no mask"), EXIT_CONFIGURATION, "rank 1: ring has no mask"),
        (GroupLost("rank 0 is gone"), EXIT_GROUP_LOST, None),
    ],
)
def test_failed_rank_registers_its_reason(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    code: int,
    reason: str | None,
) -> None:
    def fail(model: Model, device: str) -> None:
        raise error

    monkeypatch.setattr(follower, "load_follower", fail)
    monkeypatch.setattr(follower.signal, "signal", lambda *_: None)
    monkeypatch.setattr(Place, "watch_starter", lambda *_: False)
    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        settings = WorkerSettings(data=tmp_path / "data", redis_url=server.url)
        assert follower.run_follower(MODEL, Place("cpu", rank=1, size=2), settings) == code
        store = Store.connect(server.url)
        states = [(worker.report.state, worker.report.error) for worker in store.workers()]
        store.close()
    assert states == ([] if reason is None else [("failed", reason)])
