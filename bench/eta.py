"""How accurate the ETA is at half way: a job of 100 images on a real worker.

The model is a fake whose forward pass sleeps, so the processor's speed doesn't matter. The job runs
alone, behind another job, next to another job, and with mixed steps. The figure is the error of the
ETA at half way as a share of the time that was actually left.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench import serving
from bench.report import Metrics
from imagemill.client.clients import Client

IMAGES = 100
STEPS = 30
SECONDS_PER_STEP = 0.05
MODELS = """
[models.fake]
path = "./model"
dtype = "float32"
workers = 1
defaults = {{ width = 128, height = 128, steps = {steps}, guidance_scale = 2.5 }}
"""

Prompts = Sequence[dict[str, Any]]


def run() -> Metrics:
    """Run every scene; the figure is the largest error."""
    plain: Prompts = [{"prompt": f"image {number}"} for number in range(IMAGES)]
    mixed: Prompts = [{**prompt, "steps": (10, 20, 40)[n % 3]} for n, prompt in enumerate(plain)]
    misses = {}
    with _up() as client:
        client.submit("fake", plain[:40]).wait()  # so that the pace is known
        misses["alone"] = _miss(client, plain)
        misses["mixed steps"] = _miss(client, mixed)
        misses["next to another job"] = _miss(client, plain, plain[:60])
        misses["next to a longer one, mixed"] = _miss(client, mixed, mixed, first_priority=5)
        misses["behind one of priority 9"] = _miss(client, plain, plain[:50], first_priority=9)
    print(f"\nETA of {IMAGES} images at half way, against what was then left (miss)")
    for name, (eta, left) in misses.items():
        print(f"  {name:<28}{eta:8.1f} s{left:8.1f} s{abs(eta - left) / left:8.0%}")
    return {"eta_miss": max(abs(eta - left) / left for eta, left in misses.values())}


def _miss(
    client: Client, prompts: Prompts, first: Prompts = (), first_priority: int = 5
) -> tuple[float, float]:
    """The ETA at half way of a job behind another, and the seconds that were actually left."""
    other = client.submit("fake", list(first), priority=first_priority) if first else None
    job = client.submit("fake", list(prompts))

    def look() -> dict[str, Any]:
        return client.get(f"/v1/jobs/{job.id}")

    seen: dict[str, Any] = {}
    while (seen := look())["progress"] < 0.5:
        time.sleep(0.05)
    asked = time.monotonic()
    job.wait()
    left = time.monotonic() - asked
    if other is not None:
        other.wait()
    return float(seen["eta_seconds"] or 0.0), left


@contextmanager
def _up() -> Iterator[Client]:
    """A service and a ready worker of the fake model."""
    index = {"_class_name": "FakePipeline", "options": {"seconds_per_step": SECONDS_PER_STEP}}
    with serving.folder() as data:
        (data / "model").mkdir()
        (data / "model" / "model_index.json").write_text(json.dumps(index))
        (data / "models.toml").write_text(MODELS.format(steps=STEPS))
        with serving.service(data, data / "models.toml", "fake") as client:
            yield client
