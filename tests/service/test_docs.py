"""The documentation page: complete without other hosts, under a strict policy."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from jobs.runtime.embedded_queue import EmbeddedServer
from tests.page.conftest import ARGUMENTS, ARTIFACTS, chromium
from tests.service.conftest import Deployment, deployed
from tests.service.live import listening
from tests.waiting import PATIENCE


def test_docs_show_every_route_without_other_hosts(server: EmbeddedServer, tmp_path: Path) -> None:
    path = chromium()
    complaints: list[str] = []
    foreign: list[str] = []
    with (
        deployed(server.url, tmp_path, start=False) as service,
        listening(service.client.app) as url,
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
            lambda sent: None if sent.url.startswith((url, "data:")) else foreign.append(sent.url),
        )
        page.goto(f"{url}/docs")
        page.locator(".opblock").first.wait_for()
        operations = sum(map(len, service.client.app.openapi()["paths"].values()))
        assert page.locator(".opblock").count() == operations
        submit = page.locator("#operations-jobs-submitJob")
        submit.locator(".opblock-summary-control").click()
        submit.locator(".try-out__btn").click()
        submit.locator(".execute").click()
        response = submit.locator(".live-responses-table .response-col_status")
        response.first.wait_for()
        assert "202" in " ".join(response.all_inner_texts())
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / "docs.png")
        browser.close()
    assert (complaints, foreign) == ([], [])


def test_page_refers_to_no_other_host(deployment: Deployment) -> None:
    response = deployment.client.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in re.findall(r'(?:src|href)="([^"]+)"', response.text):
        assert "//" not in name
        assert deployment.client.get(f"/{name}").status_code == 200


def test_cached_files_are_304(deployment: Deployment) -> None:
    for path in ("/docs", "/docs/swagger-ui-bundle.js"):
        tag = deployment.client.get(path).headers["etag"]
        response = deployment.client.get(path, headers={"If-None-Match": tag})
        assert (response.status_code, response.content) == (304, b"")


@pytest.mark.parametrize("path", ["/redoc", "/docs/", "/docs/x.js", "/docs/..%2Fcore.py"])
def test_other_paths_are_404(deployment: Deployment, path: str) -> None:
    assert deployment.client.get(path).status_code == 404
