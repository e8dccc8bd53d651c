"""One mill and one Chromium for all tests of the page; a fresh visitor for each.

The fixtures end with this folder's last test: Playwright keeps an event loop on this thread, which
asyncio's own tests would trip over. Without a Chromium the tests are skipped, and fail under CI.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from service.keys import KeyRing
from tests import web
from tests.page.mill import ROOT, running_mill
from tests.waiting import PATIENCE, wait_until

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ARTIFACTS = ROOT / "test-artifacts"

expect.set_options(timeout=PATIENCE * 1000)


@dataclass
class Visitor:
    """Somebody at the page, and what their browser complained of."""

    page: Page
    url: str
    name: str
    complaints: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    """What the browser may complain of, once each: the end of an address, and the status."""
    wants_key: bool = False
    sees_failures: bool = False
    """An image that fails between two looks may be asked for its preview, which is a 404."""

    def watch(self) -> None:
        """Note console errors, uncaught exceptions, and requests that leave the server."""
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._on_request)

    def shoot(self, what: str) -> None:
        """Keep a screenshot."""
        ARTIFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"page-{what}-{self.name}.png")

    def turn_to(self, part: str) -> None:
        """Tap the tab, where there are tabs."""
        if self.name == "phone":
            self.page.locator(f"#tabs [data-part={part}]").click()

    def open_job(self, job: str) -> None:
        """Go to a job by its address."""
        self.page.goto(f"{self.url}/#job/{job}")
        self.turn_to("images")
        expect(self.page.locator("#job-head")).to_be_visible()

    def job_id(self) -> str:
        """The job on show."""
        match = re.search(r"#job/([\w-]+)$", self.page.url)
        assert match
        return match[1]

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        address = message.location["url"]
        if "401" in message.text and self.wants_key:
            return
        if "404" in message.text and address.endswith("/preview") and self.sees_failures:
            return
        for end, status in self.refusals:
            if address.endswith(end) and status in message.text:
                self.refusals.remove((end, status))
                return
        self.complaints.append(f"{message.text} ({address})")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, f"blob:{self.url}")):
            self.strangers.append(request.url)


@pytest.fixture(scope="package")
def mill_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="package")
def mill(mill_folder: Path) -> Iterator[str]:
    with running_mill(mill_folder, worker="tests.page.worker") as url:
        yield url


def chromium() -> str:
    """The machine's Chromium; skips the test, or under CI fails it, where there is none."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        lacking = pytest.fail if os.environ.get("CI") else pytest.skip
        lacking("there is no Chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=["desk", "phone"])
def visitor(request: pytest.FixtureRequest, mill: str, browser: Browser) -> Iterator[Visitor]:
    """At 1280 px in the light, and at 390 px in the dark; no complaint may be left at the end."""
    is_phone = request.param == "phone"
    context = browser.new_context(
        viewport={"width": 390, "height": 844} if is_phone else {"width": 1280, "height": 800},
        color_scheme="dark" if is_phone else "light",
        has_touch=is_phone,
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(PATIENCE * 1000)
    visitor = Visitor(context.new_page(), mill, request.param)
    visitor.watch()
    visitor.page.goto(mill)
    yield visitor
    context.close()
    assert visitor.complaints == []
    assert visitor.strangers == []


@pytest.fixture
def hold(mill_folder: Path) -> Iterator[Path]:
    """Images with [hold] in their prompts stay half way until this file is removed."""
    path = mill_folder / "data" / "hold"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def key(visitor: Visitor, mill_folder: Path) -> Iterator[str]:
    """An API key of the service, which wants one until the end of the test."""
    ring = KeyRing(mill_folder / "data" / "keys.json")
    key, made = ring.add("local")
    visitor.wants_key = True
    try:
        wait_until(lambda: web.get(f"{visitor.url}/v1/jobs").status_code == 401)
        yield key
    finally:
        ring.revoke(made.id)
        wait_until(lambda: web.get(f"{visitor.url}/v1/jobs").status_code == 200)
