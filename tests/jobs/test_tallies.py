"""The queue's counters, used for metrics."""

from jobs.queue.keys import WAITS_MS
from tests.jobs.bench import MODEL, Bench, request


def counts(bench: Bench) -> dict[str, int]:
    """The counters of the test model."""
    return {what: by[MODEL] for what, by in bench.store.tallies().items()}


def test_first_claims_are_counted_by_how_long_they_waited(bench: Bench) -> None:
    job_id = bench.submit(3)
    waited = 20_000
    created = int(bench.raw.hget(bench.key("job", job_id), "created"))
    bench.raw.hset(bench.key("job", job_id), "created", created - waited)
    bench.claim(2)
    tallies = counts(bench)
    assert tallies["waits"] == 2
    assert 2 * waited <= tallies["waited_ms"] < 2 * waited + 20_000
    for bound in WAITS_MS:
        assert tallies.get(f"wait_{bound}", 0) == (0 if bound <= waited else 2)


def test_only_the_first_claim_counts_as_waiting(bench: Bench) -> None:
    bench.submit(1)
    lease = bench.claim_one()
    bench.store.fail(lease, "no", again=True)
    again = bench.claim_one(worker="w2")
    bench.lose(again)
    bench.store.sweep()
    bench.claim_one(worker="w3")
    assert counts(bench) | {"waited_ms": 0} == {
        "waits": 1,
        "waited_ms": 0,
        "retried": 1,
        "lost": 1,
        **{f"wait_{bound}": 1 for bound in WAITS_MS},
    }


def test_a_late_commit_is_counted(bench: Bench) -> None:
    bench.submit(1)
    late = bench.claim_one()
    bench.lose(late)
    bench.store.sweep()
    bench.commit(late)
    bench.commit(bench.claim_one(worker="w2"))
    bench.commit(late)
    assert counts(bench)["refused"] == 2


def test_models_are_counted_separately(bench: Bench) -> None:
    bench.submit(2)
    bench.submit([request(model="other")])
    bench.claim(5)
    bench.claim(5, model="other")
    waits = bench.store.tallies()["waits"]
    assert waits == {MODEL: 2, "other": 1}
