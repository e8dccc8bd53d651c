"""One deployment and one Chromium for all tests of the page, and a new visitor for each test.

The fixtures end with this folder's last test, because Playwright keeps an event loop running on
this thread, which would break asyncio tests. Without Chromium the tests are skipped, or fail in CI.
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
from tests.page.deployment import ROOT, running_deployment
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
    """A browser page, and the errors that it reported."""

    page: Page
    url: str
    name: str
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    """Expected errors, once each: the end of the URL, and the status."""
    wants_key: bool = False
    sees_failures: bool = False
    """The preview of an image that fails between two polls may be requested, which is a 404."""

    def watch(self) -> None:
        """Record console errors, uncaught exceptions, and requests to other hosts."""
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._on_request)

    def shoot(self, what: str) -> None:
        """Save a screenshot."""
        ARTIFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"page-{what}-{self.name}.png")

    def turn_to(self, part: str) -> None:
        """Tap a tab, if there are tabs."""
        if self.name == "phone":
            self.page.locator(f"#tabs [data-part={part}]").click()

    def open_job(self, job: str) -> None:
        """Open a job by its URL."""
        self.page.goto(f"{self.url}/#job/{job}")
        self.turn_to("images")
        expect(self.page.locator("#job-head")).to_be_visible()

    def job_id(self) -> str:
        """The id of the current job."""
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
            self.foreign.append(request.url)


@pytest.fixture(scope="package")
def deployment_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="package")
def deployment(deployment_folder: Path) -> Iterator[str]:
    with running_deployment(deployment_folder, worker="tests.page.worker") as url:
        yield url


def chromium() -> str:
    """The installed Chromium; without one, skips the test, or fails it in CI."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        lacking = pytest.fail if os.environ.get("CI") else pytest.skip
        lacking("Chromium not found: apt-get install chromium")
    return path


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=["desk", "phone"])
def visitor(request: pytest.FixtureRequest, deployment: str, browser: Browser) -> Iterator[Visitor]:
    """At 1280 px in light mode, and at 390 px in dark mode; fails if there were errors."""
    is_phone = request.param == "phone"
    context = browser.new_context(
        viewport={"width": 390, "height": 844} if is_phone else {"width": 1280, "height": 800},
        color_scheme="dark" if is_phone else "light",
        has_touch=is_phone,
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(PATIENCE * 1000)
    visitor = Visitor(context.new_page(), deployment, request.param)
    visitor.watch()
    visitor.page.goto(deployment)
    yield visitor
    context.close()
    assert visitor.complaints == []
    assert visitor.foreign == []


@pytest.fixture
def hold(deployment_folder: Path) -> Iterator[Path]:
    """Images with [hold] in their prompts stay half finished until this file is removed."""
    path = deployment_folder / "data" / "hold"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def key(visitor: Visitor, deployment_folder: Path) -> Iterator[str]:
    """An API key of the service, which requires one until the end of the test."""
    ring = KeyRing(deployment_folder / "data" / "keys.json")
    key, record = ring.add("local")
    visitor.wants_key = True
    try:
        wait_until(lambda: web.get(f"{visitor.url}/v1/jobs").status_code == 401)
        yield key
    finally:
        ring.revoke(record.id)
        wait_until(lambda: web.get(f"{visitor.url}/v1/jobs").status_code == 200)
