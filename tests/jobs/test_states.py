"""The state table: a job's state follows from its counts, in both Python and Lua."""

import itertools

import pytest

from jobs.job import FINISHED, Counts, State, job_state
from tests.jobs.bench import Bench

TABLE = [
    # queued, running, succeeded, failed, cancelled
    ((2, 0, 0, 0, 0), State.QUEUED),
    ((1, 1, 0, 0, 0), State.RUNNING),
    ((0, 2, 0, 0, 0), State.RUNNING),
    ((1, 0, 1, 0, 0), State.RUNNING),
    ((1, 0, 0, 1, 0), State.RUNNING),
    ((0, 0, 2, 0, 0), State.SUCCEEDED),
    ((0, 0, 1, 1, 0), State.FAILED),
    ((0, 0, 0, 1, 1), State.FAILED),
    ((0, 0, 1, 0, 1), State.CANCELLED),
    ((0, 0, 0, 0, 2), State.CANCELLED),
]


@pytest.mark.parametrize(("counts", "state"), TABLE)
def test_a_jobs_state_follows_from_its_counts(counts: tuple[int, ...], state: State) -> None:
    result = job_state(Counts(sum(counts), *counts))
    assert result is state
    assert result.finished == (state in FINISHED)


MOVES = {
    "commit": lambda bench, lease: bench.commit(lease),
    "fail": lambda bench, lease: bench.store.fail(lease, "bad", again=False),
    "again": lambda bench, lease: bench.store.fail(lease, "busy", again=True),
    "release": lambda bench, lease: bench.store.release([lease]),
}


@pytest.mark.parametrize("moves", list(itertools.product(MOVES, repeat=2)))
def test_lua_agrees(bench: Bench, moves: tuple[str, str]) -> None:
    """The state that scripts store, for events and lists, matches the counts."""
    job_id = bench.submit(2)
    for move, lease in zip(moves, bench.claim(2), strict=True):
        MOVES[move](bench, lease)
        assert (
            bench.raw.hget(bench.key("job", job_id), "state") == bench.store.job(job_id, None).state
        )
