"""Downloads of archives and contact sheets, and the complete list of jobs."""

import base64
import io
import zipfile

import pytest
from playwright.sync_api import Request, expect

from tests import web
from tests.page.conftest import Visitor
from tests.page.deployment import submit

PICKER = """
let asked = 0;
window.showSaveFilePicker = async ({ suggestedName }) => {
  if (asked++ === 0) throw new DOMException("", "AbortError");
  const folder = await navigator.storage.getDirectory();
  return folder.getFileHandle(suggestedName, { create: true });
};
"""
"""Replaces the browser's file dialog: cancelled at first, then returns a real file."""

READ_BACK = """async (name) => {
  const folder = await navigator.storage.getDirectory();
  const file = await (await folder.getFileHandle(name)).getFile();
  let text = "";
  for (const byte of new Uint8Array(await file.arrayBuffer())) text += String.fromCharCode(byte);
  return btoa(text);
}"""


def give_key(visitor: Visitor, key: str, job: str) -> None:
    """Open the page with a key and go to the finished job."""
    page = visitor.page
    page.goto(f"{visitor.url}/#job/{job}")
    page.reload()
    page.locator("#key").fill(key)
    page.keyboard.press("Enter")
    visitor.turn_to("images")
    expect(page.locator("#job-state")).to_have_text("succeeded")


def names_in(archive: bytes) -> list[str]:
    return sorted(zipfile.ZipFile(io.BytesIO(archive)).namelist())


def test_archive_is_streamed_into_a_file_with_a_key(visitor: Visitor, key: str) -> None:
    page = visitor.page
    page.add_init_script(PICKER)
    job = submit(visitor.url, key, prompts=["one", "two"], steps=1)
    give_key(visitor, key, job)
    fetched: list[str] = []

    def note(request: Request) -> None:
        if request.url.endswith("images.zip"):
            fetched.append(request.url)

    page.on("request", note)
    page.get_by_role("button", name="Download all").click()
    page.get_by_role("button", name="Download all").click()
    expect(page.locator("#toast")).to_contain_text(f"Saved {job}.zip")
    assert len(fetched) == 1
    saved = base64.b64decode(page.evaluate(READ_BACK, f"{job}.zip"))
    assert names_in(saved) == ["00000.png", "00001.png", "manifest.json"]


def test_archive_size_is_shown_if_streaming_is_unsupported(visitor: Visitor, key: str) -> None:
    page = visitor.page
    page.add_init_script("delete window.showSaveFilePicker")
    job = submit(visitor.url, key, prompts=["one", "two"], steps=1)
    give_key(visitor, key, job)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download all").click()
    expect(page.locator("#toast")).to_contain_text("kB, which this browser keeps in memory")
    assert saved.value.suggested_filename == f"{job}.zip"
    assert len(names_in(saved.value.path().read_bytes())) == 3


def test_contact_sheets_of_a_large_job(visitor: Visitor) -> None:
    page = visitor.page
    job = submit(visitor.url, prompts=[{"prompt": "many", "n": 101}], steps=1, width=64, height=64)
    visitor.open_job(job)
    expect(page.locator("#job-state")).to_have_text("succeeded")
    button = page.get_by_role("button", name="Contact sheets")
    button.press("Enter")
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#sheet-list a")).to_have_text(["1", "2"])
    visitor.shoot("sheets")
    sheet = f"{visitor.url}/v1/jobs/{job}/sheet.png"
    for number, address in (("1", sheet), ("2", f"{sheet}?page=1")):
        with page.expect_download() as saved:
            page.get_by_role("link", name=f"Contact sheet {number}").click()
        assert saved.value.suggested_filename == f"{job}-sheet-{number}.png"
        assert saved.value.path().read_bytes() == web.get(address).content
    page.locator("#gallery button").first.focus()
    for press in ("End", "PageUp", "PageUp", "PageUp"):
        page.keyboard.press(press)
    if (
        visitor.name == "desk"
    ):  # where the header is sticky, no focused image may be hidden under it
        head, tile = page.locator("#job-head"), page.locator("#gallery button:focus")
        above, below = head.bounding_box(), tile.bounding_box()
        assert above and below and below["y"] >= above["y"] + above["height"]
    button.click()
    expect(page.locator("#sheet-list")).to_be_hidden()


@pytest.mark.parametrize("visitor", ["desk"], indirect=True)
def test_job_list_can_be_extended_to_the_oldest(visitor: Visitor) -> None:
    page, address = visitor.page, f"{visitor.url}/v1/jobs"
    body = {"model": "fake", "prompts": ["x"], "steps": 1}
    with web.Client() as client:
        job_ids = [client.post(address, json=body).json()["id"] for _ in range(205)]
    try:
        page.reload()
        more = page.get_by_role("button", name="Older jobs")
        expect(page.locator("#jobs li")).to_have_count(30)
        for count in (60, 120):
            more.click()
            expect(page.locator("#jobs li")).to_have_count(count)
        more.click()
        expect(page.locator(f"#jobs a[href='#job/{job_ids[0]}']")).to_have_count(1)
        expect(page.locator(f"#jobs a[href='#job/{job_ids[-1]}']")).to_have_count(1)
        rows = page.locator("#jobs a").evaluate_all("(links) => links.map((one) => one.hash)")
        assert len(rows) == len(set(rows)) > 200
    finally:
        with web.Client() as client:
            for job in job_ids:
                client.delete(f"{address}/{job}")
