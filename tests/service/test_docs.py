"""The documentation page: whole without any other address, under its own strict policy."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from jobs.runtime.embedded_queue import EmbeddedServer
from tests.page.conftest import ARGUMENTS, ARTIFACTS, chromium
from tests.service.conftest import Deployment, deployed
from tests.service.live import listening
from tests.waiting import PATIENCE


def test_it_shows_and_tries_every_route_without_leaving_the_server(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    path = chromium()
    complaints: list[str] = []
    strangers: list[str] = []
    with (
        deployed(server.url, tmp_path, start=False) as found,
        listening(found.client.app) as url,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.on(
            "request",
            lambda one: None if one.url.startswith((url, "data:")) else strangers.append(one.url),
        )
        page.goto(f"{url}/docs")
        page.locator(".opblock").first.wait_for()
        operations = sum(map(len, found.client.app.openapi()["paths"].values()))
        assert page.locator(".opblock").count() == operations
        submit = page.locator("#operations-jobs-submit_job_v1_jobs_post")
        submit.locator(".opblock-summary-control").click()
        submit.locator(".try-out__btn").click()
        submit.locator(".execute").click()
        answer = submit.locator(".live-responses-table .response-col_status")
        answer.first.wait_for()
        assert "202" in " ".join(answer.all_inner_texts())
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / "docs.png")
        browser.close()
    assert (complaints, strangers) == ([], [])


def test_the_page_names_no_other_address_and_says_so(mill: Deployment) -> None:
    answer = mill.client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in re.findall(r'(?:src|href)="([^"]+)"', answer.text):
        assert "//" not in name
        assert mill.client.get(f"/{name}").status_code == 200


def test_what_the_browser_has_is_not_sent_again(mill: Deployment) -> None:
    for path in ("/docs", "/docs/swagger-ui-bundle.js"):
        tag = mill.client.get(path).headers["etag"]
        answer = mill.client.get(path, headers={"If-None-Match": tag})
        assert (answer.status_code, answer.content) == (304, b"")


@pytest.mark.parametrize("path", ["/redoc", "/docs/", "/docs/x.js", "/docs/..%2Fcore.py"])
def test_nothing_else_is_served(mill: Deployment, path: str) -> None:
    assert mill.client.get(path).status_code == 404
