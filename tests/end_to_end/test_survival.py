"""Kill any part in the middle of a job: every image still arrives, once."""

import hashlib
from pathlib import Path

import pytest

from imagemill.client.clients import Client
from tests.end_to_end import mill as mills
from tests.end_to_end.mill import MODELS, Mill, midway, processes_of
from tests.waiting import PATIENCE, wait_until

COUNT = 50


NAMES = {"workers": "workers", "service": "service", "queue": "queue server"}
"""What `up` calls its children; of a single worker it leaves the supervisor to speak."""


@pytest.mark.parametrize("part", ["worker", "workers", "service", "queue"])
def test_all_images_arrive_once_though_a_part_is_killed(
    mill: Mill, part: str, tmp_path: Path
) -> None:
    with Client(mill.url, patience=PATIENCE) as client:
        job = midway(client, "demo", "a small blue star on a white background", COUNT, steps=3)
        killed = mill.kill(part)
        job.wait(PATIENCE)
        assert job.counts.succeeded == COUNT, [image.error for image in job.images()]
        paths = job.save(tmp_path)
        assert len(paths) == COUNT
        assert len({hashlib.sha256(path.read_bytes()).digest() for path in paths}) == COUNT
        seeds = {image.seed for image in job.images()}
        assert len(seeds) == COUNT
    wait_until(lambda: mill.pid_of(part) not in (None, killed))
    assert mill.process.poll() is None
    if part in NAMES:
        assert f"the {NAMES[part]} died" in mill.said()
        assert f"the {NAMES[part]} runs again" in mill.said()


def test_a_killed_up_leaves_no_process_and_loses_no_image(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    with mills.up(data) as mill:
        with Client(mill.url, patience=PATIENCE) as client:
            job = midway(client, "demo", "a large red ring on a black background", COUNT, steps=3)
        mill.process.kill()
        mill.process.wait()
        wait_until(lambda: processes_of(data) == {})
    where = ["--out", out, "--data", data, "--models", MODELS]
    done = mills.run("generate", "--resume", job.id, *where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("0*.png"))) == COUNT
    assert processes_of(data) == {}
