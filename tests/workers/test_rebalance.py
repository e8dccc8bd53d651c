"""Which workers count as idle, and how many images are given back for them."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.queue.store import WorkerInfo
from jobs.reports import WorkerReport
from workers.rebalance import idle_workers, surplus


def worker(name: str, **changes: Any) -> WorkerInfo:
    """An idle worker of the model `demo`, with these changes."""
    return WorkerInfo(name, replace(WorkerReport("demo", "ready", in_flight=0), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"in_flight": 1},
        {"state": "starting"},
        {"state": "draining"},
        {"state": "failed"},
        {"model": "other"},
    ],
)
def test_idle_workers_are_ready_and_hold_no_images(changes: dict[str, Any]) -> None:
    assert idle_workers([worker("me"), worker("a", **changes)], "me", "demo") == 0
    assert idle_workers([worker("me"), worker("b")], "me", "demo") == 1


def test_surplus_is_an_even_share_of_unstarted_images() -> None:
    assert surplus(held=8, unstarted=7, idle=1) == 4
    assert surplus(held=8, unstarted=2, idle=1) == 2
    assert surplus(held=8, unstarted=7, idle=3) == 6
    assert surplus(held=1, unstarted=1, idle=1) == 0


@given(st.integers(1, 100), st.integers(0, 100), st.integers(0, 8))
def test_worker_keeps_an_even_share(held: int, unstarted: int, idle: int) -> None:
    given_away = surplus(held, min(unstarted, held), idle)
    assert 0 <= given_away <= unstarted
    assert held - given_away >= held / (idle + 1)
    assert idle or not given_away
