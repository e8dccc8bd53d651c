"""Who counts as idle, and how much is left to them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.queue.store import WorkerInfo
from workers.rebalance import idle_neighbours, surplus


def worker(name: str, **changes: Any) -> WorkerInfo:
    """An idle worker of the model `demo`, changed as told."""
    return WorkerInfo(name, {"model": "demo", "state": "ready", "in_flight": 0, **changes})


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
def test_only_ready_ones_of_the_model_without_images_are_idle(changes: dict[str, Any]) -> None:
    assert idle_neighbours([worker("me"), worker("a", **changes)], "me", "demo") == 0
    assert idle_neighbours([worker("me"), worker("b")], "me", "demo") == 1


def test_half_goes_to_one_idle_neighbour_and_what_began_stays() -> None:
    assert surplus(held=8, unstarted=7, idle=1) == 4
    assert surplus(held=8, unstarted=2, idle=1) == 2
    assert surplus(held=8, unstarted=7, idle=3) == 6
    assert surplus(held=1, unstarted=1, idle=1) == 0


@given(st.integers(1, 100), st.integers(0, 100), st.integers(0, 8))
def test_an_even_share_is_kept(held: int, unstarted: int, idle: int) -> None:
    given_away = surplus(held, min(unstarted, held), idle)
    assert 0 <= given_away <= unstarted
    assert held - given_away >= held / (idle + 1)
    assert idle or not given_away
