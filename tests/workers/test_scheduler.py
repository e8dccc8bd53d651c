"""The scheduler's decisions, as tables and properties: values in, values out."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.scheduler import (
    BUCKETS,
    PASSED_BY_ANY,
    PASSED_BY_EQUALS,
    Candidate,
    Costs,
    Forward,
    Passed,
    choose,
    in_order,
    is_overdue,
    overtaken,
)

FLAT = Costs(tuple((64 * b, 1.0) for b in BUCKETS))
"""A device on which larger batches cost nothing extra: every bucket pays."""

UNEVEN = Costs(((64, 1.0), (256, 1.0), (512, 2.0), (1024, 3.0)))
"""A device on which 4 cost the same as 1, and 8 twice as much."""

STEEP = Costs(tuple((64 * b, float(b)) for b in BUCKETS))
"""A device on which a batch of n costs n: only bucket 1 pays."""


def candidate(key: str, **changes: object) -> Candidate:
    """A reproducible candidate of 64 tokens with 10 steps left, with these changes."""
    fields = {
        "key": key,
        "job": key,
        "priority": 5,
        "group": "64x64",
        "tokens": 64,
        "steps": 10,
        "remaining": 10,
        "age": 0.0,
        "waited": 0.0,
        "reproducible": True,
    }
    return Candidate(**{**fields, **changes})  # type: ignore[arg-type]


def test_no_candidates_is_no_forward() -> None:
    assert choose([], FLAT, {}) is None


@pytest.mark.parametrize(
    ("costs", "pinned", "largest"), [(FLAT, 32, 32), (STEEP, 1, 1), (Costs(()), 1, 1)]
)
def test_buckets_follow_the_measured_costs(costs: Costs, pinned: int, largest: int) -> None:
    assert costs.pinned(64) == pinned
    assert costs.largest(64) == largest


def test_costs_are_linear_between_points_and_proportional_outside() -> None:
    costs = Costs(((100, 1.0), (200, 3.0)))
    assert [costs.seconds(n) for n in (50, 100, 150, 200, 400)] == [0.5, 1.0, 2.0, 3.0, 6.0]


def test_exact_costs_override_points_but_never_pin() -> None:
    costs = Costs(STEEP.points, {(64, 4): 1.0}, STEEP.points)
    assert [costs.of(64, bucket) for bucket in (1, 2, 4)] == [1.0, 2.0, 1.0]
    assert costs.of(128, 2) == costs.seconds(256) == 4.0
    assert costs.largest(64) == 4
    assert costs.pinned(64) == 1


def test_shape_below_measured_range_is_not_padded() -> None:
    assert STEEP.pinned(16) == FLAT.pinned(16) == 1


def test_pinned_bucket_costs_a_lone_sample_at_most_half_more() -> None:
    costs = Costs(((64, 1.0), (128, 1.4), (256, 1.6), (512, 3.0)))
    assert costs.pinned(64) == 2


def test_least_remaining_work_first() -> None:
    forward = choose([candidate("long", remaining=20), candidate("short", remaining=2)], STEEP, {})
    assert forward is not None
    assert forward.keys == ("short",)


@pytest.mark.parametrize(
    ("age", "steps", "first"), [(37.9, 7, "short"), (38.1, 7, "long"), (38.1, 9, "short")]
)
def test_late_sample_yields_to_slightly_longer_ones(age: float, steps: int, first: str) -> None:
    """Ten steps of a second each, two of them left: it's late from an age of 38 seconds on."""
    long = candidate("long", steps=steps, remaining=steps)
    forward = choose([candidate("short", remaining=2, age=age), long], STEEP, {})
    assert forward is not None
    assert forward.keys == (first,)


def test_late_samples_keep_their_order() -> None:
    crowd = [candidate("long", age=1e3), candidate("short", remaining=2, age=1e3)]
    forward = choose(crowd, STEEP, {})
    assert forward is not None
    assert forward.keys == ("short",)


def test_trial_uses_samples_of_one_size() -> None:
    crowd = [candidate(f"f{n}", reproducible=False) for n in range(3)]
    crowd.append(candidate("larger", reproducible=False, tokens=128))
    asked = []

    def trial(tokens: int, knee: int, most: int) -> int:
        asked.append((tokens, knee, most))
        return 2

    assert choose(crowd, STEEP, {}, trial=trial) == Forward(("f0", "f1"), 2)
    assert asked == [(64, 1, 3)]


def test_no_trial_for_reproducible_samples_or_beyond_memory() -> None:
    def trial(tokens: int, knee: int, most: int) -> int:
        raise AssertionError("asked for a trial")

    pinned = [candidate(f"r{n}") for n in range(8)]
    fast = [candidate(f"f{n}", reproducible=False) for n in range(8)]
    assert choose(pinned, STEEP, {}, trial=trial) is not None
    assert choose(fast, STEEP, {"64x64": 1}, trial=trial) is not None


@pytest.mark.parametrize(("age", "bucket"), [(0.0, 1), (1e3, 4)])
def test_only_late_samples_use_the_largest_bucket(age: float, bucket: int) -> None:
    costs = Costs(((64, 1.0), (128, 1.98), (256, 3.8), (512, 7.6)))
    crowd = [candidate(f"c{i}", age=age, reproducible=False) for i in range(8)]
    forward = choose(crowd, costs, {})
    assert forward is not None
    assert forward.bucket == bucket


def test_equal_late_samples_run_oldest_first() -> None:
    crowd = [candidate(f"c{age}", age=float(age)) for age in (100, 300, 200)]
    assert [c.key for c in in_order(crowd, STEEP)] == ["c300", "c200", "c100"]


@pytest.mark.parametrize(
    ("passed", "first"),
    [
        (Passed(PASSED_BY_EQUALS * 100 - 1, 0.0), "new"),
        (Passed(PASSED_BY_EQUALS * 100 + 1, 0.0), "old"),
        (Passed(0.0, PASSED_BY_ANY * 100 - 1), "new"),
        (Passed(0.0, PASSED_BY_ANY * 100 + 1), "old"),
    ],
)
def test_overdue_sample_goes_first(passed: Passed, first: str) -> None:
    crowd = [candidate("old", age=100.0, passed=passed), candidate("new", remaining=1)]
    assert in_order(crowd, STEEP)[0].key == first


def test_oldest_overdue_sample_goes_first() -> None:
    crowd = [
        candidate("younger", age=100.0, remaining=1, passed=Passed(90.0, 90.0)),
        candidate("older", age=101.0, passed=Passed(90.0, 90.0)),
    ]
    assert in_order(crowd, STEEP)[0].key == "older"


def test_on_time_sample_is_never_overdue() -> None:
    assert not is_overdue(candidate("c", age=20.0, passed=Passed(20.0, 20.0)), STEEP)


def test_overdue_samples_of_a_large_job_take_turns() -> None:
    passed = Passed(1e3, 1e3)
    large = [candidate(f"l{n}", job="large", age=1e3, passed=passed) for n in range(8)]
    order = [c.key for c in in_order([*large, candidate("small")], STEEP)]
    assert order[:2] == ["l0", "small"]


def test_overtaking_excludes_own_job_and_higher_priority() -> None:
    waiting = candidate("w", age=10.0)
    batch = [
        candidate("newer and equal", age=9.0),
        candidate("newer and longer", age=9.0, steps=11),
        candidate("newer and shorter", age=9.0, steps=9),
        candidate("older", age=11.0),
        candidate("urgent", age=9.0, priority=6),
        candidate("of the same job", age=9.0, job="w"),
        candidate("newer, less urgent", age=9.0, priority=4),
        candidate("as old", age=10.0),
    ]
    assert overtaken(waiting, batch) == Passed(equals=3 / 8, any=4 / 8)


def test_waiting_outweighs_remaining_work_eventually() -> None:
    waited = [candidate("long", remaining=20, waited=500.0), candidate("short", remaining=2)]
    forward = choose(waited, STEEP, {})
    assert forward is not None
    assert forward.keys == ("long",)


def test_priority_goes_first_until_waiting_raises_others() -> None:
    high = candidate("high", priority=9, remaining=20)
    for waited, expected in ((0.0, "high"), (200.0, "low")):
        forward = choose([candidate("low", priority=4, waited=waited), high], STEEP, {})
        assert forward is not None
        assert forward.keys == (expected,)


def test_large_job_does_not_hold_up_a_small_one() -> None:
    large = [candidate(f"l{i}", job="large", remaining=1) for i in range(9)]
    small = [candidate(f"s{i}", job="small", remaining=20) for i in range(2)]
    forward = choose([*large, *small], Costs(((64, 1.0), (256, 1.4), (512, 9.0))), {})
    assert forward is not None
    assert forward.keys == ("l0", "s0", "l1", "s1")


def test_groups_never_mix() -> None:
    mixed = [candidate(f"a{i}") for i in range(3)] + [candidate("b", group="128x128", remaining=1)]
    forward = choose(mixed, FLAT, {})
    assert forward is not None
    assert forward.keys == ("b",)


def test_fast_samples_fill_the_pinned_bucket() -> None:
    costs = Costs(((64, 1.0), (128, 1.2), (256, 1.4), (512, 4.0)))
    few = [candidate("r", remaining=1), candidate("f", reproducible=False)]
    forward = choose(few, costs, {})
    assert forward is not None
    assert set(forward.keys) == {"r", "f"}
    assert forward.bucket == 4


@pytest.mark.parametrize(("costs", "bucket", "count"), [(FLAT, 8, 5), (UNEVEN, 4, 4)])
def test_fast_samples_use_the_best_bucket(costs: Costs, bucket: int, count: int) -> None:
    crowd = [candidate(f"f{i}", reproducible=False, remaining=1) for i in range(5)]
    forward = choose([*crowd, candidate("r")], costs, {})
    assert forward is not None
    assert (forward.bucket, len(forward.keys)) == (bucket, count)
    assert all(key.startswith("f") for key in forward.keys)


def test_bucket_is_never_padded_beyond_the_ceiling() -> None:
    crowd = [candidate(f"f{i}", reproducible=False) for i in range(3)]
    forward = choose(crowd, FLAT, {"64x64": 2})
    assert forward is not None
    assert (forward.bucket, len(forward.keys)) == (2, 2)


def test_mixed_sizes_share_a_forward_up_to_the_knee() -> None:
    small = candidate("small", reproducible=False, remaining=1)
    large = [candidate(f"l{i}", reproducible=False, tokens=4096) for i in range(20)]
    forward = choose([small, *large], Costs(((64, 1.0), (1024, 1.5), (2048, 3.0))), {})
    assert forward is not None
    assert forward.keys == ("small",)


def test_ceiling_applies_to_its_group_only() -> None:
    crowd = [candidate(f"c{i}") for i in range(8)]
    bounded, free = choose(crowd, FLAT, {"64x64": 2}), choose(crowd, FLAT, {"other": 2})
    assert bounded is not None
    assert free is not None
    assert len(bounded.keys) == 2
    assert len(free.keys) == 8


candidates = st.lists(
    st.builds(
        candidate,
        key=st.uuids().map(str),
        group=st.sampled_from(["a", "b"]),
        steps=st.integers(50, 60),
        remaining=st.integers(1, 50),
        age=st.floats(0, 300),
        waited=st.floats(0, 100),
        reproducible=st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


@given(candidates, st.sampled_from([FLAT, STEEP, Costs(((64, 1.0), (256, 1.3), (512, 2.0)))]))
def test_every_forward_is_valid(crowd: list[Candidate], costs: Costs) -> None:
    forward = choose(crowd, costs, {})
    assert forward is not None
    chosen = [c for c in crowd if c.key in forward.keys]
    assert 1 <= len(chosen) == len(forward.keys) <= forward.bucket
    assert forward.bucket in BUCKETS
    assert len({c.group for c in chosen}) == 1
    if any(c.reproducible for c in chosen):
        assert forward.bucket == costs.pinned(64)


@given(candidates)
def test_nothing_waits_forever(crowd: list[Candidate]) -> None:
    """However short the others are, the one that has waited longest is chosen eventually."""
    old = candidate("old", group="own", steps=50, remaining=50, age=1e6, waited=1e6)
    forward = choose([*crowd, old], STEEP, {})
    assert forward is not None
    assert forward.keys == ("old",)


def filled(
    crowd: list[Candidate], costs: Costs, slots: int, running: list[Forward] | None = None
) -> list[Forward]:
    """The forward passes that `choose` puts into the slots, after those that run."""
    passes = list(running or ())
    while len(passes) < slots:
        chosen = {key for forward in passes for key in forward.keys}
        idle = [c for c in crowd if c.key not in chosen]
        busy = [c for c in crowd if c.key in chosen]
        forward = choose(idle, costs, {}, slots=slots, running=len(passes), busy=busy)
        if forward is None:
            break
        passes.append(forward)
    return passes


def sizes(passes: list[Forward]) -> list[int]:
    return [len(forward.keys) for forward in passes]


def test_lone_group_is_divided_among_slots() -> None:
    crowd = [candidate(f"f{i}", reproducible=False) for i in range(8)]
    assert sizes(filled(crowd, FLAT, 2)) == [4, 4]
    assert sizes(filled(crowd, FLAT, 4)) == [2, 2, 2, 2]
    assert sizes(filled(crowd[:1], FLAT, 4)) == [1]
    assert sizes(filled(crowd[:5], FLAT, 3)) == [2, 2, 1]


def test_group_leaves_a_slot_to_another() -> None:
    crowd = [candidate(f"f{i}", reproducible=False, remaining=1) for i in range(4)]
    other = candidate("other", group="b", reproducible=False)
    assert sizes(filled([*crowd, other], FLAT, 3)) == [2, 2, 1]
    running = [Forward(("other",), 1)]
    assert sizes(filled([*crowd, other], FLAT, 3, running)) == [1, 2, 2]
    more = replace(other, key="more")
    running = [Forward(("other",), 1), Forward(("f0", "f1"), 2)]
    assert sizes(filled([*crowd, other, more], FLAT, 4, running)) == [
        1,
        2,
        1,
        1,
    ]


def test_two_groups_get_a_slot_each() -> None:
    crowd = [candidate(f"f{i}", group=str(i % 2), reproducible=False) for i in range(8)]
    assert sizes(filled(crowd, FLAT, 2)) == [4, 4]


def test_uneven_start_is_balanced_later() -> None:
    crowd = [candidate(f"f{i}", reproducible=False) for i in range(8)]
    first = [Forward(("f0",), 1)]
    assert sizes(filled(crowd, FLAT, 2, first)) == [1, 4]


def test_reproducible_samples_keep_their_bucket_in_every_slot() -> None:
    crowd = [candidate(f"r{i}") for i in range(6)]
    costs = Costs(((64, 1.0), (128, 1.2), (256, 1.4), (512, 4.0)))
    assert [forward.bucket for forward in filled(crowd, costs, 4)] == [4, 4]


@given(
    candidates,
    st.sampled_from([FLAT, STEEP, Costs(((64, 1.0), (256, 1.3), (512, 2.0)))]),
    st.integers(1, 4),
)
@example([candidate(str(i), reproducible=False) for i in range(4)], FLAT, 3)
def test_filled_slots_are_valid(crowd: list[Candidate], costs: Costs, slots: int) -> None:
    """No sample is in two passes, none waits for a free slot, no slot gets too much of a group."""
    passes = filled(crowd, costs, slots)
    keys = [key for forward in passes for key in forward.keys]
    assert len(keys) == len(set(keys))
    assert len(passes) == slots or len(keys) == len(crowd)
    by_key = {c.key: c for c in crowd}
    for forward in passes:
        members = [by_key[key] for key in forward.keys]
        assert len({c.group for c in members}) == 1
        if any(c.reproducible for c in members):
            assert forward.bucket == costs.pinned(64)
    if len({c.group for c in crowd}) == 1 and not any(c.reproducible for c in crowd):
        assert len(passes) == min(slots, len(crowd))
        assert max(sizes(passes)) <= -(-len(crowd) // slots)
