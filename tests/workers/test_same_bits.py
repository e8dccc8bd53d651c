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
