"""Use of the page, from pasting prompts to downloads, at 1280 px and at 390 px."""

import re
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests import web
from tests.page.conftest import Visitor
from tests.page.deployment import submit
from tests.waiting import wait_until

MOST_ELEMENTS = 900
"""Limit for the whole page, however many images a job has."""

MOST_ADDED, MOST_LAYOUTS = 400, 4
"""Limits on the added elements and layouts per frame while a thousand images are scrolled through.
They measure the cost of a frame independently of the machine's speed."""


def generate(visitor: Visitor, prompts: str, **fields: int) -> None:
    """Fill in the form and press Ctrl+Enter."""
    page = visitor.page
    expect(page.locator("#model")).to_have_value("fake")
    visitor.turn_to("create")
    for name, value in fields.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#prompts").fill(prompts)
    page.locator("#prompts").press("Control+Enter")


def test_job_without_workers_shows_why(visitor: Visitor) -> None:
    job = submit(visitor.url, model="abandoned", prompts=["a circle"], width=256, height=256)
    visitor.open_job(job)
    warnings = visitor.page.locator("#job-warnings")
    expect(warnings).to_have_text("no worker of model 'abandoned' is running")
    visitor.page.get_by_role("button", name="Cancel").click()
    expect(visitor.page.locator("#job-state")).to_have_text("cancelled")
    expect(warnings).to_be_hidden()


def test_from_paste_to_download(visitor: Visitor, hold: Path) -> None:
    page = visitor.page
    visitor.shoot("empty")
    generate(visitor, "a red circle [hold]\n\na blue heart [hold]", steps=100, copies=2, seed=7)
    expect(page.locator("#gallery li")).to_have_count(4)
    expect(page.locator("#gallery li[data-state=running] img[data-loaded]").first).to_be_visible()
    expect(page.locator("#job-progress")).to_have_attribute("aria-valuenow", re.compile(r"[1-9]"))
    visitor.shoot("running")
    hold.unlink()
    expect(page.locator("#job-state")).to_have_text("succeeded")
    expect(page.locator("#gallery li[data-state=succeeded] img[data-loaded]")).to_have_count(4)
    expect(page.locator("#announcer")).to_contain_text("4 of 4 images done")
    visitor.shoot("gallery")
    with page.expect_download() as all_of_them:
        page.get_by_role("button", name="Download all").click()
    names = zipfile.ZipFile(all_of_them.value.path()).namelist()
    assert len(names) == 5 and any("manifest.json" in name for name in names)
    page.locator("#gallery button").first.click()
    with page.expect_download() as one:
        page.locator("#recipe").get_by_role("button", name="Download").click()
    data = web.get(f"{visitor.url}/v1/jobs/{visitor.job_id()}/images/0").content
    assert one.value.path().read_bytes() == data


def test_cancel_then_retry(visitor: Visitor, hold: Path) -> None:
    page = visitor.page
    generate(visitor, "\n".join(f"a slow one {n} [hold]" for n in range(6)), steps=10)
    expect(page.locator("#gallery li[data-state=running] img[data-loaded]").first).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-state")).to_have_text("cancelled")
    expect(page.locator("#gallery li[data-state=cancelled]")).to_have_count(6)
    expect(page.locator("#gallery img[data-loaded]")).to_have_count(0)
    visitor.shoot("cancelled")
    hold.unlink()
    page.get_by_role("button", name="Retry unfinished").click()
    expect(page.locator("#job-state")).to_have_text("succeeded")
    expect(page.locator("#gallery li[data-state=succeeded]")).to_have_count(6)


def test_failed_image_shows_its_error_and_can_be_filtered(visitor: Visitor) -> None:
    page = visitor.page
    visitor.sees_failures = True
    job = submit(visitor.url, prompts=["fine", "[refuse] this one"], steps=1)
    visitor.open_job(job)
    expect(page.locator("#job-state")).to_have_text("failed")
    failed = page.locator("#gallery li[data-state=failed]")
    expect(failed.locator(".tile-facts")).to_contain_text("told to refuse")
    expect(page).to_have_title("1 failed · imagemill")
    visitor.shoot("failed")
    page.get_by_role("button", name="Not generated 1").click()
    expect(page.locator("#gallery li")).to_have_count(1)
    expect(failed).to_be_visible()
    page.get_by_role("button", name="Done 1").click()
    expect(page.locator("#gallery li[data-state=succeeded]")).to_have_count(1)
    expect(failed).to_have_count(0)


def test_delete_needs_confirmation(visitor: Visitor) -> None:
    page = visitor.page
    job = submit(visitor.url, prompts=["soon gone"], steps=1)
    visitor.open_job(job)
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("button", name="Keep")).to_be_focused()
    visitor.shoot("delete")
    page.keyboard.press("Escape")
    assert web.get(f"{visitor.url}/v1/jobs/{job}").status_code == 200
    page.get_by_role("button", name="Delete").click()
    page.locator("#confirm-yes").click()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#toast")).to_contain_text("Deleted the job")
    expect(page.locator("#images")).to_be_focused()
    assert web.get(f"{visitor.url}/v1/jobs/{job}").status_code == 404


def test_key_is_requested_and_can_be_forgotten(visitor: Visitor, key: str) -> None:
    """With a key, every image is loaded with fetch, because an <img> can't send one."""
    page = visitor.page
    job = submit(visitor.url, key, prompts=["a secret"], steps=1, width=512, height=512)
    page.goto(f"{visitor.url}/#job/{job}")
    page.reload()
    page.locator("#key").fill("im_wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-wrong")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#key-dialog")).to_be_visible()
    visitor.shoot("key")
    page.locator("#key").fill(key)
    page.keyboard.press("Enter")
    expect(page.locator("#key-dialog")).to_be_hidden()
    visitor.turn_to("images")
    expect(page.locator("#gallery img[data-loaded]")).to_have_attribute("src", re.compile("^blob:"))
    visitor.turn_to("queue")
    page.get_by_role("button", name="Forget the API key").click()
    expect(page.locator("#key-dialog")).to_be_visible()


@pytest.mark.parametrize("visitor", ["desk"], indirect=True)
def test_nothing_is_cut_off_at_any_width(visitor: Visitor) -> None:
    page = visitor.page
    visitor.sees_failures = True
    job = submit(visitor.url, prompts=["one", "[refuse] two", "three"], steps=1)
    visitor.open_job(job)
    expect(page.locator("#job-state")).to_have_text("failed")
    for width in (320, 390, 720, 721, 900, 1080, 1081):
        page.set_viewport_size({"width": width, "height": 720})
        across = page.evaluate("document.documentElement.scrollWidth")
        assert across <= width, f"at {width} px the page is {across} px wide"
        if width > 720:
            for name in ("#submit", "#workers .worker", "#delete", "#gallery li >> nth=0"):
                box = page.locator(name).bounding_box()
                assert box and box["x"] >= 0 and box["x"] + box["width"] <= width, (name, width)
                assert box["y"] + min(box["height"], 40) <= 720, (name, width)
        if width in (721, 900, 1080):
            visitor.shoot(f"{width}px")


@pytest.mark.parametrize("visitor", ["desk"], indirect=True)
def test_all_controls_have_names(visitor: Visitor) -> None:
    nameless = visitor.page.evaluate(
        """() => [...document.querySelectorAll("button, a, input, select, textarea, dialog, img")]
          .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.labels?.length
            || one.alt !== undefined && one.hasAttribute("alt")
            || one.hasAttribute("aria-labelledby")))
          .map((one) => one.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("visitor", ["desk"], indirect=True)
def test_tiles_load_thumbnails(visitor: Visitor) -> None:
    page = visitor.page
    large = submit(visitor.url, prompts=["large"], steps=1, width=512, height=512)
    visitor.open_job(large)
    tile = page.locator(f'#gallery img[data-loaded][src*="{large}"]')
    expect(tile).to_have_attribute("src", re.compile("/images/0/thumbnail\\?side=256$"))
    page.locator("#gallery button").click()
    expect(page.locator("#recipe-image[data-loaded]")).to_have_attribute(
        "src", re.compile("/images/0$")
    )


def test_errors_are_shown_at_their_fields(visitor: Visitor) -> None:
    page = visitor.page
    generate(visitor, "")
    expect(page.locator("#prompts-error")).to_have_text("Enter at least one prompt.")
    visitor.refusals = [("/v1/jobs", "422")] * 2
    generate(visitor, "a fine prompt", steps=5000)
    expect(page.locator("#steps-error")).to_contain_text("200")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#steps")).to_be_focused()
    visitor.shoot("bad-input")
    generate(visitor, f"fine\n\n{'long ' * 2001}", steps=4)
    expect(page.locator("#prompts-error")).to_contain_text("Line 3:")
    expect(page.locator("#steps-error")).to_be_empty()


def test_thousand_images_use_few_elements(visitor: Visitor) -> None:
    page = visitor.page
    job = submit(
        visitor.url, prompts=[{"prompt": "many", "n": 1000}], steps=200, width=64, height=64
    )
    visitor.open_job(job)
    expect(page.locator("#gallery li").first).to_have_attribute("aria-setsize", "1000")
    last = page.locator("#gallery li[data-index='999'] button:focus")

    def at_the_end() -> bool:
        page.locator("#gallery button").first.press("End")
        return last.count() == 1

    wait_until(at_the_end)  # opening a job moves the focus too, possibly after the first key
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")

    def layouts() -> float:
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "LayoutCount")

    before = layouts()
    added = page.evaluate(
        """async () => {
          const pane = document.getElementById("images");
          const added = [];
          const observer = new MutationObserver((records) => {
            for (const record of records)
              for (const node of record.addedNodes)
                if (node.nodeType === Node.ELEMENT_NODE)
                  added[added.length - 1] += 1 + node.querySelectorAll("*").length;
          });
          observer.observe(document.body, { childList: true, subtree: true });
          for (let round = 0; round < 40; round++) {
            added.push(0);
            pane.scrollTop = (pane.scrollHeight * round) / 40;
            await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
          }
          observer.disconnect();
          return added;
        }"""
    )
    per_frame = (layouts() - before) / (2 * len(added))
    assert 0 < max(added) <= MOST_ADDED, added
    assert per_frame <= MOST_LAYOUTS, per_frame
    assert page.locator("*").count() < MOST_ELEMENTS
    visitor.shoot("thousand")
    page.locator("#cancel").click()
    expect(page.locator("#job-state")).to_have_text("cancelled")


def test_page_headers(deployment: str) -> None:
    response = web.get(deployment)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    tag = {"If-None-Match": response.headers["etag"]}
    assert web.get(deployment, headers=tag).status_code == 304
    assert (
        web.get(f"{deployment}/web/page.js").headers["content-type"].startswith("text/javascript")
    )
    assert web.get(f"{deployment}/web/nothing.js").status_code == 404
