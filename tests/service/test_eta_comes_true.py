"""The ETA of a running job against what then happens, with a real worker on a fake model."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests import web
from tests.page import mill
from tests.waiting import PATIENCE, wait_until

DEVICE = {"seconds_per_step": 0.05, "largest_batch": 8}
"""As an accelerator is: so many samples take the time of one."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mill.INDEX, "options", DEVICE)
        with mill.running_mill(tmp_path_factory.mktemp("eta")) as url:
            yield url


@pytest.mark.parametrize("steps", [[32] * 40, [16, 48] * 20], ids=["alike", "mixed"])
def test_half_way_the_eta_is_right_but_for_a_part(address: str, steps: list[int]) -> None:
    """A bound that catches a wrong factor, not a measurement."""
    prompts = [{"prompt": f"image {place}", "steps": count} for place, count in enumerate(steps)]
    job = f"{address}/v1/jobs/{mill.submit(address, prompts=prompts)}"

    def half_way() -> dict[str, Any] | None:
        found: dict[str, Any] = web.get(f"{job}?images=none").json()
        return found if found["progress"] >= 0.5 else None

    seen = wait_until(half_way)
    began = time.monotonic()
    assert web.get(f"{job}?wait=60", timeout=PATIENCE).json()["state"] == "succeeded"
    share = seen["eta_seconds"] / (time.monotonic() - began)
    assert 0.6 < share < 1 / 0.6
