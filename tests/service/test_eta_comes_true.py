"""The ETA of a running job against the actual time, by the clock of the worker's device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import web
from tests.page import deployment
from tests.service.metered import PASS_SECONDS
from tests.waiting import wait_until

HALF = 640
"""Half of the steps of forty images of 32 steps each on average."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eta")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with deployment.running_deployment(folder, worker="tests.service.metered") as url:
        yield url


def beat(address: str) -> float:
    """The time of the worker's last report."""
    [worker] = wait_until(lambda: web.get(f"{address}/v1/workers").json()["data"])
    return float(worker["at"])


def whole_beat(address: str) -> None:
    """Wait for a report that was started after this call."""
    for _ in range(2):
        before = beat(address)
        wait_until(lambda known=before: beat(address) > known)


def passes(address: str) -> int:
    """The number of the worker's forward passes."""
    text = web.get(f"{address}/metrics").text
    [count] = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "imagemill_forward_samples_count"
    ]
    return int(count)


@pytest.mark.parametrize(
    ("name", "steps"), [("alike", [32] * 40), ("mixed", [16, 48] * 20)], ids=["alike", "mixed"]
)
def test_eta_at_half_way_is_roughly_right(
    address: str, folder: Path, name: str, steps: list[int]
) -> None:
    """A bound that catches a wrong factor, not a measurement."""
    allowed = folder / "data" / f"{name}.allowed"
    allowed.write_text(str(HALF))
    prompts = [{"prompt": f"{name} {place}", "steps": count} for place, count in enumerate(steps)]
    job = f"{address}/v1/jobs/{deployment.submit(address, prompts=prompts)}"

    def job_view() -> dict[str, Any]:
        return dict(web.get(f"{job}?images=none").json())

    wait_until((folder / "data" / f"{name}.waiting").exists)
    whole_beat(address)
    half_way, passes_so_far = job_view(), passes(address)
    assert 0.4 < half_way["progress"] < 0.6
    allowed.unlink()
    wait_until(lambda: job_view()["state"] == "succeeded")
    whole_beat(address)
    share = half_way["eta_seconds"] / ((passes(address) - passes_so_far) * PASS_SECONDS)
    assert 0.6 < share < 1 / 0.6
