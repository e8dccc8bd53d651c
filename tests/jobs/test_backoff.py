"""The pause before a restart doubles, and starts over after a long life."""

from jobs.runtime.backoff import FIRST_PAUSE, LONGEST_PAUSE, SETTLED_SECONDS, Backoff


def test_the_pause_doubles_up_to_the_longest() -> None:
    backoff = Backoff()
    pauses = [backoff.failed(0.0) for _ in range(9)]
    assert pauses == [min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(9)]
    assert pauses[-1] == LONGEST_PAUSE


def test_the_pause_starts_over() -> None:
    backoff = Backoff()
    for _ in range(3):
        backoff.failed(0.0)
    assert backoff.failed(SETTLED_SECONDS + 1) == FIRST_PAUSE
    assert backoff.failed(SETTLED_SECONDS) == 2 * FIRST_PAUSE
    backoff.reset()
    assert backoff.failed(0.0) == FIRST_PAUSE
