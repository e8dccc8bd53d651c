"""The search for the highest load, with a policy that can sustain up to a known one."""

import pytest

from bench.goodput import PRECISION, STRIDE, arrivals
from bench.search import highest
from jobs.request import ImageRequest


@pytest.mark.parametrize("guess", [1.0, 7.3, 60.0])
def test_the_highest_load_is_found_from_either_side(guess: float) -> None:
    load = highest(lambda rate: rate <= 7.3, guess, least=0.1, precision=PRECISION, stride=STRIDE)
    assert 7.3 / PRECISION <= load <= 7.3


def test_the_search_ends_for_a_policy_that_sustains_nothing() -> None:
    asked = []

    def never(rate: float) -> bool:
        asked.append(rate)
        return False

    with pytest.raises(RuntimeError, match=r"even a load of 0\.5"):
        highest(never, 8.0, least=0.5, precision=PRECISION, stride=STRIDE)
    assert min(asked) > 0.5 / 2


def test_a_longer_trace_begins_as_a_shorter_one() -> None:
    request = ImageRequest("demo", "a ring", 0, 128, 128, 8, 1.0)
    short, long = (arrivals(2.0, [request] * count, seed=1) for count in (5, 400))
    assert long[:5] == short
    assert long[-1].at == pytest.approx(400 / 2.0, rel=0.2)
