"""Random faults in workers, server and callers, and an audit afterwards.

`IMAGEMILL_CHAOS_ACTIONS` makes the storm longer; `IMAGEMILL_CHAOS_SEED` repeats its choices.
"""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.deployment import Deployment
from tests.waiting import wait_until

STORM_ACTIONS = int(os.environ.get("IMAGEMILL_CHAOS_ACTIONS", "40"))
SHORT_LEASE = 0.3
SEED = int(os.environ.get("IMAGEMILL_CHAOS_SEED", random.SystemRandom().randrange(10**6)))


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    random.seed(SEED)
    deployment = Deployment(tmp_path, workers=3, lease_seconds=SHORT_LEASE)
    yield deployment
    deployment.close()


@pytest.fixture
def calm(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment whose workers lose a lease only by dying, never by a late heartbeat."""
    deployment = Deployment(tmp_path, workers=3, lease_seconds=10 * SHORT_LEASE)
    yield deployment
    deployment.close()


def test_a_storm(deployment: Deployment) -> None:
    """Random kills, freezes, server crashes, poison, cancels, retries and deletes."""
    actions = [
        lambda: deployment.submit(["a cat"] * random.randint(1, 20)),
        lambda: deployment.submit(["a cat"] * random.randint(50, 200)),
        lambda: deployment.submit(["a cat", "poison", "a cat"], max_stalls=1),
        deployment.kill_worker,
        deployment.kill_worker,
        lambda: deployment.freeze_worker(0.5),
        deployment.kill_server,
        deployment.forget_scripts,
        lambda: deployment.move("cancel"),
        lambda: deployment.move("retry"),
        lambda: deployment.move("delete"),
    ]
    for action in actions[:6]:
        action()
    for _ in range(STORM_ACTIONS):
        random.choice(actions)()
        deployment.replace_dead_workers()
        pause = deployment.store_time() + random.uniform(0, 0.3)
        wait_until(lambda until=pause: deployment.store_time() > until)
    jobs = deployment.drain()
    sys.stderr.write(f"seed {SEED}: {dict(deployment.counts)}\n")
    deployment.audit(jobs)
    assert jobs


def test_a_poisonous_image_takes_no_others_down(calm: Deployment) -> None:
    job_id = calm.submit(["a cat"] * 5 + ["poison"] + ["a cat"] * 5, max_stalls=3)
    [job] = calm.drain()
    failed = [image for image in calm.store.images(job_id) if image.state == "failed"]
    assert [(image.index, image.error) for image in failed] == [
        (5, "its worker died or hung 4 times")
    ]
    assert job.counts.succeeded == 10
    calm.audit([job])


def test_nothing_is_lost_if_all_workers_and_the_server_die_at_once(deployment: Deployment) -> None:
    job_id = deployment.submit(["a cat"] * 300)
    wait_until(lambda: deployment.store.job(job_id, None).counts.succeeded > 30)
    for child in deployment.children:
        child.kill()
    deployment.kill_server()
    [job] = deployment.drain()
    assert job.counts.succeeded == 300
    deployment.audit([job])
