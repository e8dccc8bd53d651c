"""Workers, the server and the callers at their worst, and then the books.

`IMAGEMILL_CHAOS_ACTIONS` makes the storm longer; `IMAGEMILL_CHAOS_SEED` repeats its choices.
"""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.mill import Mill
from tests.waiting import wait_until

STORM_ACTIONS = int(os.environ.get("IMAGEMILL_CHAOS_ACTIONS", "40"))
SHORT_LEASE = 0.3
SEED = int(os.environ.get("IMAGEMILL_CHAOS_SEED", random.SystemRandom().randrange(10**6)))


@pytest.fixture
def mill(tmp_path: Path) -> Iterator[Mill]:
    random.seed(SEED)
    mill = Mill(tmp_path, workers=3, lease_seconds=SHORT_LEASE)
    yield mill
    mill.close()


@pytest.fixture
def calm(tmp_path: Path) -> Iterator[Mill]:
    """Its workers lose a lease by dying, and not because they come late to their heartbeats."""
    mill = Mill(tmp_path, workers=3, lease_seconds=10 * SHORT_LEASE)
    yield mill
    mill.close()


def test_a_storm(mill: Mill) -> None:
    """Kills, freezes, lost servers, poison, cancels, retries and deletes, all at random."""
    actions = [
        lambda: mill.submit(["a cat"] * random.randint(1, 20)),
        lambda: mill.submit(["a cat"] * random.randint(50, 200)),
        lambda: mill.submit(["a cat", "poison", "a cat"], max_stalls=1),
        mill.kill_worker,
        mill.kill_worker,
        lambda: mill.freeze_worker(0.5),
        mill.kill_server,
        mill.forget_scripts,
        lambda: mill.move("cancel"),
        lambda: mill.move("retry"),
        lambda: mill.move("delete"),
    ]
    for action in actions[:6]:
        action()
    for _ in range(STORM_ACTIONS):
        random.choice(actions)()
        mill.replace_dead_workers()
        pause = mill.store_time() + random.uniform(0, 0.3)
        wait_until(lambda until=pause: mill.store_time() > until)
    jobs = mill.drain()
    sys.stderr.write(f"seed {SEED}: {dict(mill.done)}\n")
    mill.audit(jobs)
    assert jobs


def test_a_poisonous_image_takes_no_neighbour_with_it(calm: Mill) -> None:
    job_id = calm.submit(["a cat"] * 5 + ["poison"] + ["a cat"] * 5, max_stalls=3)
    [job] = calm.drain()
    failed = [image for image in calm.store.images(job_id) if image.state == "failed"]
    assert [(image.index, image.error) for image in failed] == [
        (5, "its worker died or hung 4 times")
    ]
    assert job.counts.succeeded == 10
    calm.audit([job])


def test_nothing_is_lost_when_every_worker_and_the_server_die_at_once(mill: Mill) -> None:
    job_id = mill.submit(["a cat"] * 300)
    wait_until(lambda: mill.store.job(job_id, None).counts.succeeded > 30)
    for child in mill.children:
        child.kill()
    mill.kill_server()
    [job] = mill.drain()
    assert job.counts.succeeded == 300
    mill.audit([job])
