"""The scheduler's decisions, by table and by property: values in, values out."""

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
"""A device on which a larger batch costs nothing: every bucket pays."""

UNEVEN = Costs(((64, 1.0), (256, 1.0), (512, 2.0), (1024, 3.0)))
"""A device on which 4 cost as much as 1, and 8 twice as much."""

STEEP = Costs(tuple((64 * b, float(b)) for b in BUCKETS))
"""A device on which a batch of n costs n: no bucket but 1 pays."""


def candidate(key: str, **changes: object) -> Candidate:
    """A reproducible candidate of 64 tokens with 10 steps to go, changed as told."""
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


def test_nothing_in_flight_is_no_forward() -> None:
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


def test_an_exact_cost_goes_before_the_points_but_never_pins() -> None:
    costs = Costs(STEEP.points, {(64, 4): 1.0}, STEEP.points)
    assert [costs.of(64, bucket) for bucket in (1, 2, 4)] == [1.0, 2.0, 1.0]
    assert costs.of(128, 2) == costs.seconds(256) == 4.0
    assert costs.largest(64) == 4
    assert costs.pinned(64) == 1


def test_a_shape_smaller_than_any_measured_is_not_padded_on_a_guess() -> None:
    assert STEEP.pinned(16) == FLAT.pinned(16) == 1


def test_pinned_bucket_costs_a_lone_sample_at_most_half_more() -> None:
    costs = Costs(((64, 1.0), (128, 1.4), (256, 1.6), (512, 3.0)))
    assert costs.pinned(64) == 2


def test_least_remaining_work_goes_first() -> None:
    forward = choose([candidate("long", remaining=20), candidate("short", remaining=2)], STEEP, {})
    assert forward is not None
    assert forward.keys == ("short",)


@pytest.mark.parametrize(
    ("age", "steps", "first"), [(37.9, 7, "short"), (38.1, 7, "long"), (38.1, 9, "short")]
)
def test_what_is_late_lets_others_go_first_that_are_not_much_longer(
    age: float, steps: int, first: str
) -> None:
    """Ten steps of a second each, two of them to come: good time ends at an age of 40."""
    long = candidate("long", steps=steps, remaining=steps)
    forward = choose([candidate("short", remaining=2, age=age), long], STEEP, {})
    assert forward is not None
    assert forward.keys == (first,)


def test_what_is_too_late_keeps_its_order() -> None:
    crowd = [candidate("long", age=1e3), candidate("short", remaining=2, age=1e3)]
    forward = choose(crowd, STEEP, {})
    assert forward is not None
    assert forward.keys == ("short",)


def test_a_larger_bucket_is_tried_with_samples_of_one_size() -> None:
    crowd = [candidate(f"f{n}", reproducible=False) for n in range(3)]
    crowd.append(candidate("larger", reproducible=False, tokens=128))
    asked = []

    def trial(tokens: int, knee: int, most: int) -> int:
        asked.append((tokens, knee, most))
        return 2

    assert choose(crowd, STEEP, {}, trial=trial) == Forward(("f0", "f1"), 2)
    assert asked == [(64, 1, 3)]


def test_no_larger_bucket_is_tried_with_reproducible_samples_or_beyond_memory() -> None:
    def trial(tokens: int, knee: int, most: int) -> int:
        raise AssertionError("asked for a trial")

    pinned = [candidate(f"r{n}") for n in range(8)]
    fast = [candidate(f"f{n}", reproducible=False) for n in range(8)]
    assert choose(pinned, STEEP, {}, trial=trial) is not None
    assert choose(fast, STEEP, {"64x64": 1}, trial=trial) is not None


@pytest.mark.parametrize(("age", "bucket"), [(0.0, 1), (1e3, 4)])
def test_a_little_more_throughput_is_for_those_who_are_late_anyway(age: float, bucket: int) -> None:
    costs = Costs(((64, 1.0), (128, 1.98), (256, 3.8), (512, 7.6)))
    crowd = [candidate(f"c{i}", age=age, reproducible=False) for i in range(8)]
    forward = choose(crowd, costs, {})
    assert forward is not None
    assert forward.bucket == bucket


def test_equal_late_samples_go_oldest_first() -> None:
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
def test_a_late_sample_passed_for_too_long_goes_first(passed: Passed, first: str) -> None:
    crowd = [candidate("old", age=100.0, passed=passed), candidate("new", remaining=1)]
    assert in_order(crowd, STEEP)[0].key == first


def test_of_those_passed_for_too_long_the_oldest_goes_first() -> None:
    crowd = [
        candidate("younger", age=100.0, remaining=1, passed=Passed(90.0, 90.0)),
        candidate("older", age=101.0, passed=Passed(90.0, 90.0)),
    ]
    assert in_order(crowd, STEEP)[0].key == "older"


def test_an_on_time_sample_is_not_overdue_however_long_it_was_passed() -> None:
    assert not is_overdue(candidate("c", age=20.0, passed=Passed(20.0, 20.0)), STEEP)


def test_a_large_jobs_overdue_samples_leave_others_their_turn() -> None:
    passed = Passed(1e3, 1e3)
    large = [candidate(f"l{n}", job="large", age=1e3, passed=passed) for n in range(8)]
    order = [c.key for c in in_order([*large, candidate("small")], STEEP)]
    assert order[:2] == ["l0", "small"]


def test_overtaking_counts_newer_samples_of_other_jobs_and_no_higher_priority() -> None:
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


def test_waiting_outweighs_remaining_work_in_the_end() -> None:
    waited = [candidate("long", remaining=20, waited=500.0), candidate("short", remaining=2)]
    forward = choose(waited, STEEP, {})
    assert forward is not None
    assert forward.keys == ("long",)


def test_priority_goes_first_until_waiting_has_raised_the_others() -> None:
    high = candidate("high", priority=9, remaining=20)
    for waited, expected in ((0.0, "high"), (200.0, "low")):
        forward = choose([candidate("low", priority=4, waited=waited), high], STEEP, {})
        assert forward is not None
        assert forward.keys == (expected,)


def test_a_large_job_does_not_hold_up_a_small_one() -> None:
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


def test_reproducible_samples_run_in_the_pinned_bucket_with_fast_ones_in_free_places() -> None:
    costs = Costs(((64, 1.0), (128, 1.2), (256, 1.4), (512, 4.0)))
    few = [candidate("r", remaining=1), candidate("f", reproducible=False)]
    forward = choose(few, costs, {})
    assert forward is not None
    assert set(forward.keys) == {"r", "f"}
    assert forward.bucket == 4


@pytest.mark.parametrize(("costs", "bucket", "count"), [(FLAT, 8, 5), (UNEVEN, 4, 4)])
def test_fast_samples_run_in_the_bucket_that_makes_most(
    costs: Costs, bucket: int, count: int
) -> None:
    crowd = [candidate(f"f{i}", reproducible=False, remaining=1) for i in range(5)]
    forward = choose([*crowd, candidate("r")], costs, {})
    assert forward is not None
    assert (forward.bucket, len(forward.keys)) == (bucket, count)
    assert all(key.startswith("f") for key in forward.keys)


def test_no_bucket_is_padded_beyond_what_memory_held() -> None:
    crowd = [candidate(f"f{i}", reproducible=False) for i in range(3)]
    forward = choose(crowd, FLAT, {"64x64": 2})
    assert forward is not None
    assert (forward.bucket, len(forward.keys)) == (2, 2)


def test_mixed_sizes_share_a_forward_only_up_to_the_knee() -> None:
    small = candidate("small", reproducible=False, remaining=1)
    large = [candidate(f"l{i}", reproducible=False, tokens=4096) for i in range(20)]
    forward = choose([small, *large], Costs(((64, 1.0), (1024, 1.5), (2048, 3.0))), {})
    assert forward is not None
    assert forward.keys == ("small",)


def test_a_ceiling_bounds_the_batch_of_its_group_alone() -> None:
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
def test_every_forward_is_sound(crowd: list[Candidate], costs: Costs) -> None:
    forward = choose(crowd, costs, {})
    assert forward is not None
    chosen = [c for c in crowd if c.key in forward.keys]
    assert 1 <= len(chosen) == len(forward.keys) <= forward.bucket
    assert forward.bucket in BUCKETS
    assert len({c.group for c in chosen}) == 1
    if any(c.reproducible for c in chosen):
        assert forward.bucket == costs.pinned(64)


@given(candidates)
def test_nothing_waits_for_ever(crowd: list[Candidate]) -> None:
    """However short the others are, one that has waited longest is chosen in the end."""
    old = candidate("old", group="own", steps=50, remaining=50, age=1e6, waited=1e6)
    forward = choose([*crowd, old], STEEP, {})
    assert forward is not None
    assert forward.keys == ("old",)


def filled(
    crowd: list[Candidate], costs: Costs, slots: int, running: list[Forward] | None = None
) -> list[Forward]:
    """The forward passes that `choose` puts into so many slots, beside those that run."""
    passes = list(running or ())
    while len(passes) < slots:
        taken = {key for one in passes for key in one.keys}
        idle = [c for c in crowd if c.key not in taken]
        busy = [c for c in crowd if c.key in taken]
        forward = choose(idle, costs, {}, slots=slots, running=len(passes), busy=busy)
        if forward is None:
            break
        passes.append(forward)
    return passes


def test_a_lone_group_is_divided_over_the_slots() -> None:
    crowd = [candidate(f"f{i}", reproducible=False) for i in range(8)]
    assert [len(one.keys) for one in filled(crowd, FLAT, 2)] == [4, 4]
    assert [len(one.keys) for one in filled(crowd, FLAT, 4)] == [2, 2, 2, 2]
    assert [len(one.keys) for one in filled(crowd[:1], FLAT, 4)] == [1]
    assert [len(one.keys) for one in filled(crowd[:5], FLAT, 3)] == [2, 2, 1]


def test_a_group_leaves_a_slot_to_one_that_has_none_yet() -> None:
    crowd = [candidate(f"f{i}", reproducible=False, remaining=1) for i in range(4)]
    other = candidate("other", group="b", reproducible=False)
    assert [len(one.keys) for one in filled([*crowd, other], FLAT, 3)] == [2, 2, 1]
    running = [Forward(("other",), 1)]
    assert [len(one.keys) for one in filled([*crowd, other], FLAT, 3, running)] == [1, 2, 2]
    more = replace(other, key="more")
    running = [Forward(("other",), 1), Forward(("f0", "f1"), 2)]
    assert [len(one.keys) for one in filled([*crowd, other, more], FLAT, 4, running)] == [
        1,
        2,
        1,
        1,
    ]


def test_two_groups_take_a_slot_each_and_stay_whole() -> None:
    crowd = [candidate(f"f{i}", group=str(i % 2), reproducible=False) for i in range(8)]
    assert [len(one.keys) for one in filled(crowd, FLAT, 2)] == [4, 4]


def test_a_group_that_began_unevenly_is_divided_evenly_later() -> None:
    crowd = [candidate(f"f{i}", reproducible=False) for i in range(8)]
    first = [Forward(("f0",), 1)]
    assert [len(one.keys) for one in filled(crowd, FLAT, 2, first)] == [1, 4]


def test_reproducible_samples_keep_their_bucket_in_every_slot() -> None:
    crowd = [candidate(f"r{i}") for i in range(6)]
    costs = Costs(((64, 1.0), (128, 1.2), (256, 1.4), (512, 4.0)))
    assert [one.bucket for one in filled(crowd, costs, 4)] == [4, 4]


@given(
    candidates,
    st.sampled_from([FLAT, STEEP, Costs(((64, 1.0), (256, 1.3), (512, 2.0)))]),
    st.integers(1, 4),
)
@example([candidate(str(i), reproducible=False) for i in range(4)], FLAT, 3)
def test_slots_are_filled_soundly(crowd: list[Candidate], costs: Costs, slots: int) -> None:
    """No sample is in two passes, none waits beside a free slot, no slot hoards a lone group."""
    passes = filled(crowd, costs, slots)
    keys = [key for one in passes for key in one.keys]
    assert len(keys) == len(set(keys))
    assert len(passes) == slots or len(keys) == len(crowd)
    by_key = {c.key: c for c in crowd}
    for one in passes:
        members = [by_key[key] for key in one.keys]
        assert len({c.group for c in members}) == 1
        if any(c.reproducible for c in members):
            assert one.bucket == costs.pinned(64)
    if len({c.group for c in crowd}) == 1 and not any(c.reproducible for c in crowd):
        assert len(passes) == min(slots, len(crowd))
        sizes = [len(one.keys) for one in passes]
        assert max(sizes) <= -(-len(crowd) // slots)
