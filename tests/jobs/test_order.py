"""The fair order: shares of tenants and of a tenant's jobs, priorities, positions."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.queue.store import Ahead
from tests.jobs.bench import Bench, request


def tenants_of(bench: Bench, order: list[tuple[str, int]]) -> list[str]:
    names = {job: bench.store.job(job, None).tenant for job, _ in order}
    return [names[job] for job, _ in order]


def test_a_heavy_tenant_does_not_keep_a_light_one_waiting(bench: Bench) -> None:
    bench.submit(1000, tenant="heavy")
    bench.order(50)
    bench.submit(4, tenant="light")
    assert tenants_of(bench, bench.order(8)).count("light") == 4


def test_a_long_job_does_not_keep_a_short_one_of_its_tenant_waiting(bench: Bench) -> None:
    bench.submit(500)
    bench.order(50)
    short = bench.submit(4)
    assert [job for job, _ in bench.order(8)].count(short) == 4


def test_many_jobs_get_no_more_than_one(bench: Bench) -> None:
    for _ in range(10):
        bench.submit(10, tenant="many")
    bench.submit(10, tenant="one")
    assert Counter(tenants_of(bench, bench.order(20))) == {"many": 10, "one": 10}


def test_shares_are_by_cost_not_by_number(bench: Bench) -> None:
    bench.submit([request(steps=32)] * 20, tenant="large")
    bench.submit([request(steps=8)] * 80, tenant="small")
    counted = Counter(tenants_of(bench, bench.order(50)))
    assert counted == {"large": 10, "small": 40}


def test_a_weight_is_a_share(bench: Bench) -> None:
    bench.submit(90, tenant="triple", weight=3)
    bench.submit(90, tenant="single")
    assert Counter(tenants_of(bench, bench.order(40))) == {"triple": 30, "single": 10}


def test_coming_back_gives_no_advantage(bench: Bench) -> None:
    """A tenant who submits one by one doesn't overtake a tenant who submitted all at once."""
    bench.submit(100, tenant="whole")
    order = []
    for _ in range(20):
        bench.submit(1, tenant="drip")
        order += tenants_of(bench, bench.order(1))
    assert order.count("drip") <= 11


def test_tenants_who_left_are_not_remembered_for_long(bench: Bench) -> None:
    bench.submit(100, tenant="whole")
    for number in range(30):
        bench.submit(1, tenant=f"drop{number}")
        bench.order(2)
    assert bench.raw.zcard(bench.key("idle", "demo", 5)) <= 2


def test_a_new_job_of_a_tenant_gets_no_more_than_the_old_one(bench: Bench) -> None:
    old = bench.submit(200)
    bench.order(100)
    new = bench.submit(100)
    assert Counter(job for job, _ in bench.order(20)) == {old: 10, new: 10}


def test_being_away_earns_no_credit(bench: Bench) -> None:
    bench.submit(1, tenant="late")
    bench.submit(300, tenant="busy")
    bench.order(200)
    bench.submit(50, tenant="late")
    assert 4 <= tenants_of(bench, bench.order(10)).count("late") <= 6


def test_higher_priority_goes_first(bench: Bench) -> None:
    low, high = bench.submit(2, priority=1), bench.submit(2, priority=8)
    assert [job for job, _ in bench.order(4)] == [high, high, low, low]


def test_a_low_priority_that_waited_long_goes_once(bench: Bench) -> None:
    low = bench.submit(5, priority=0)
    high = bench.submit(50, priority=9)
    assert bench.claim_one().job_id == high
    long_ago = int(bench.raw.hget(bench.key("times"), "demo:0")) - 300_000
    bench.raw.hset(bench.key("times"), "demo:0", long_ago)
    bench.submit(1, priority=0)
    assert [bench.claim_one().job_id for _ in range(3)] == [low, high, high]


def test_a_band_that_was_empty_has_not_waited(bench: Bench) -> None:
    bench.submit(1, priority=0)
    bench.make_all()
    assert not bench.raw.exists(bench.key("times"))


def test_positions_of_one_job(bench: Bench) -> None:
    job_id = bench.submit(10)
    assert bench.store.ahead(job_id) == Ahead(0, 9)
    bench.claim(4)
    assert bench.store.ahead(job_id) == Ahead(0, 5)
    bench.claim(6)
    assert bench.store.position(job_id) is None


def test_positions_among_tenants_and_bands(bench: Bench) -> None:
    bench.submit(100, tenant="heavy")
    light = bench.submit(4, tenant="light")
    assert bench.store.ahead(light) == Ahead(1, 7)
    bench.submit(30, tenant="vip", priority=9)
    assert bench.store.ahead(light) == Ahead(31, 37)
    assert bench.store.ahead("nonsense") is None


submissions = st.lists(
    st.tuples(
        st.sampled_from(["ann", "bob", "cy"]), st.integers(1, 12), st.integers(0, 6)
    ),  # tenant, images, claims before it
    min_size=1,
    max_size=7,
)


@given(submissions)
@settings(max_examples=40)
def test_positions_predict_the_claims(bench: Bench, plan: list[tuple[str, int, int]]) -> None:
    """Exactly, if all images cost the same and no one joins or prefers a size."""
    bench.clear()
    jobs, queued = [], 0
    for tenant, images, claims in plan:
        queued += images - len(bench.claim(claims))
        jobs.append(bench.submit(images, tenant=tenant))
    bench.store.release(bench.claim(1, worker="w2"))
    predicted = {job: bench.store.ahead(job) for job in jobs}
    order = [job for job, _ in bench.order(queued)]
    for job, ahead in predicted.items():
        positions = [position for position, claimed in enumerate(order) if claimed == job]
        assert ahead == (Ahead(positions[0], positions[-1]) if positions else None)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), min_size=2, max_size=6))
@settings(max_examples=25)
def test_shares_are_even_at_every_moment(bench: Bench, plan: list[tuple[str, int]]) -> None:
    """While two tenants both have queued images, their shares differ by at most one image."""
    bench.clear()
    queued: Counter[str] = Counter()
    for tenant, images in plan:
        bench.submit(images, tenant=tenant)
        queued[tenant] += images
    claimed: Counter[str] = Counter()
    for tenant in tenants_of(bench, bench.order(sum(queued.values()))):
        claimed[tenant] += 1
        queued[tenant] -= 1
        shares = sorted(claimed[name] for name in queued if queued[name] > 0)
        assert all(later - earlier <= 1 for earlier, later in pairwise(shares))


@pytest.mark.parametrize("jobs", [2, 40])
def test_tags_start_over_when_a_band_is_empty(bench: Bench, jobs: int) -> None:
    for number in range(jobs):
        bench.submit(2, tenant=f"t{number}")
    bench.make_all()
    kinds = {name.partition(":")[0] for name in bench.all_keys()}
    assert not kinds & {"ready", "fair", "idle", "load", "bell", "depth", "times"}


def test_many_jobs_ahead_are_counted_without_reading_each(bench: Bench) -> None:
    ids = [bench.submit(2) for _ in range(250)]
    for place in (0, 31, 32, 33, 100, 180, 249):
        ahead = bench.store.ahead(ids[place])
        assert ahead is not None
        assert (ahead.next, ahead.last) == (place, 250 + place)
    bench.claim(130, held=())
    after = bench.store.ahead(ids[200])
    assert after is not None and after.next == 200 - 130


def calls(bench: Bench, tenants: int) -> int:
    """How many commands the server runs to find a job's position among this many tenants."""
    bench.clear()
    ids = [bench.submit(2, tenant=f"t{n:04}", priority=5 + n % 2) for n in range(tenants)]
    bench.raw.config_resetstat()
    assert bench.store.ahead(ids[-2]) is not None
    return sum(stats["calls"] for stats in bench.raw.info("commandstats").values())


def test_a_position_among_many_tenants_costs_no_more_commands(bench: Bench) -> None:
    assert calls(bench, 1000) <= calls(bench, 100) + 5


def test_many_tenants_ahead_are_counted_without_reading_each(bench: Bench) -> None:
    ids = [bench.submit(2, tenant=f"t{n:04}") for n in range(250)]
    for place in (0, 31, 32, 33, 100, 180, 249):
        ahead = bench.store.ahead(ids[place])
        assert ahead is not None
        assert (ahead.next, ahead.last) == (place, 250 + place)
        assert ahead.work == (249 + place) * 128 * 128 * 8
    bench.order(130)
    after = bench.store.ahead(ids[200])
    assert after is not None and after.next == 200 - 130
    for number in range(100):
        bench.submit([request(steps=20)], tenant=f"vip{number}", priority=9)
    raised = bench.store.ahead(ids[200])
    assert raised is not None
    assert (raised.next, raised.work) == (after.next + 100, after.work + 100 * 128 * 128 * 20)


def test_the_work_of_others_is_in_pixel_steps(bench: Bench) -> None:
    bench.submit([request(steps=20)] * 4, weight=2)
    second = bench.submit(2)
    ahead = bench.store.ahead(second)
    assert ahead is not None and ahead.last >= 2
    others = ahead.last - 1  # all before its last one, except its own first
    assert ahead.work == others * 128 * 128 * 20
    above = bench.submit([request(steps=50)], priority=9)
    raised = bench.store.ahead(second)
    assert raised is not None and raised.work == ahead.work + 128 * 128 * 50
    own = bench.store.ahead(above)
    assert own is not None and own.work == 0
