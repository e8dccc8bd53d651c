"""The scheduler where warm-up found buckets that give the same bits as a lone sample."""

from dataclasses import replace

import pytest

from tests.workers.test_scheduler import UNEVEN, candidate
from workers.scheduler import Forward, choose

ANY_OF_4 = replace(UNEVEN, same_bits={repr("64x64"): 4})
"""Bits don't depend on the bucket up to 4. The pinned bucket is 4, the best one 16."""


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 4)])
def test_reproducible_samples_use_any_bucket_that_gives_the_same_bits(
    count: int, bucket: int
) -> None:
    forward = choose([candidate(f"r{n}") for n in range(count)], ANY_OF_4, {})
    assert forward is not None
    assert (len(forward.keys), forward.bucket) == (min(count, bucket), bucket)


@pytest.mark.parametrize("first", [True, False])
def test_both_classes_share_buckets_that_give_the_same_bits(first: bool) -> None:
    crowd = [candidate("a", reproducible=first, age=1.0)]
    crowd += [candidate(f"b{n}", reproducible=not first) for n in range(9)]
    forward = choose(crowd, ANY_OF_4, {})
    assert forward is not None
    assert (len(forward.keys), forward.bucket) == (4, 4)


def test_the_same_bits_are_known_by_group() -> None:
    forward = choose([candidate("r", group="64x96")], ANY_OF_4, {})
    assert forward == Forward(("r",), 4)


def test_fast_samples_can_use_larger_buckets_than_reproducible_ones() -> None:
    crowd = [candidate(f"f{n}", reproducible=n % 2 == 1, age=1.0 - n / 100) for n in range(32)]
    forward = choose(crowd, ANY_OF_4, {})
    assert forward is not None
    assert forward.bucket == 16
    assert forward.keys == tuple(f"f{n}" for n in range(0, 32, 2))


@pytest.mark.parametrize(
    ("first", "limit", "tried"), [(True, 16, None), (True, 32, 32), (False, 16, 32)]
)
def test_trials_keep_to_the_buckets_with_the_same_bits(
    first: bool, limit: int, tried: int | None
) -> None:
    costs = replace(UNEVEN, same_bits={repr("64x64"): limit})
    crowd = [candidate("a", reproducible=first, age=1.0)]
    crowd += [candidate(f"b{n}", reproducible=False) for n in range(40)]
    forward = choose(crowd, costs, {}, trial=lambda tokens, knee, most: 2 * knee)
    assert forward is not None
    assert forward.bucket == (tried or 16)
    assert forward.keys[0] == "a"
