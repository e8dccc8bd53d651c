"""The ETA of a running job against what then happens, by the clock of the worker's device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import web
from tests.page import mill
from tests.service.metered import PASS_SECONDS
from tests.waiting import wait_until

HALF = 640
"""Steps, of forty images of 32 each on average."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eta")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with mill.running_mill(folder, worker="tests.service.metered") as url:
        yield url


def beat(address: str) -> float:
    """When the worker told last what it has measured."""
    [worker] = wait_until(lambda: web.get(f"{address}/v1/workers").json()["data"])
    return float(worker["at"])


def whole_beat(address: str) -> None:
    """Wait for a beat that begins from now on."""
    for _ in range(2):
        before = beat(address)
        wait_until(lambda known=before: beat(address) > known)


def passes(address: str) -> int:
    """How many forward passes the worker has made."""
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
def test_half_way_the_eta_is_right_but_for_a_part(
    address: str, folder: Path, name: str, steps: list[int]
) -> None:
    """A bound that catches a wrong factor, not a measurement."""
    allowed = folder / "data" / f"{name}.allowed"
    allowed.write_text(str(HALF))
    prompts = [{"prompt": f"{name} {place}", "steps": count} for place, count in enumerate(steps)]
    job = f"{address}/v1/jobs/{mill.submit(address, prompts=prompts)}"

    def told() -> dict[str, Any]:
        return dict(web.get(f"{job}?images=none").json())

    wait_until((folder / "data" / f"{name}.waiting").exists)
    whole_beat(address)
    half_way, made = told(), passes(address)
    assert 0.4 < half_way["progress"] < 0.6
    allowed.unlink()
    wait_until(lambda: told()["state"] == "succeeded")
    whole_beat(address)
    share = half_way["eta_seconds"] / ((passes(address) - made) * PASS_SECONDS)
    assert 0.6 < share < 1 / 0.6
