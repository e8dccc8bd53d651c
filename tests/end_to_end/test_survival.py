"""Kill any part in the middle of a job: every image still arrives exactly once."""

import hashlib
from pathlib import Path

import pytest

from imagemill.client.clients import Client
from tests.end_to_end.deployment import MODELS, Deployment, midway, processes_of, run, up
from tests.waiting import PATIENCE, wait_until

COUNT = 50


NAMES = {"workers": "workers", "service": "service", "queue": "queue server"}
"""The names `up` prints for its children; a single worker's death is the supervisor's to log."""


@pytest.mark.parametrize("part", ["worker", "workers", "service", "queue"])
def test_all_images_arrive_once_after_a_part_is_killed(
    deployment: Deployment, part: str, tmp_path: Path
) -> None:
    with Client(deployment.url, patience=PATIENCE) as client:
        job = midway(client, "demo", "a small blue star on a white background", COUNT, steps=3)
        killed = deployment.kill(part)
        job.wait(PATIENCE)
        assert job.counts.succeeded == COUNT, [image.error for image in job.images()]
        paths = job.save(tmp_path)
        assert len(paths) == COUNT
        assert len({hashlib.sha256(path.read_bytes()).digest() for path in paths}) == COUNT
        seeds = {image.seed for image in job.images()}
        assert len(seeds) == COUNT
    wait_until(lambda: deployment.pid_of(part) not in (None, killed))
    assert deployment.process.poll() is None
    if part in NAMES:
        assert f"the {NAMES[part]} died" in deployment.said()
        assert f"the {NAMES[part]} is running again" in deployment.said()


def test_after_a_killed_up_no_process_is_left_and_no_image_lost(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    with up(data) as deployment:
        with Client(deployment.url, patience=PATIENCE) as client:
            job = midway(client, "demo", "a large red ring on a black background", COUNT, steps=3)
        deployment.process.kill()
        deployment.process.wait()
        wait_until(lambda: processes_of(data) == {})
    where = ["--out", out, "--data", data, "--models", MODELS]
    done = run("generate", "--resume", job.id, *where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("0*.png"))) == COUNT
    assert processes_of(data) == {}
