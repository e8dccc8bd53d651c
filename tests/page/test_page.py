"""What people do at the page, from paste to download, at 1280 px and at 390 px."""

import re
import zipfile

import httpx
from playwright.sync_api import expect

from tests.page.conftest import Visitor
from tests.page.mill import submit

MOST_ELEMENTS = 900
"""On the whole page, however many images a job has."""


def generate(visitor: Visitor, prompts: str, **fields: int) -> None:
    """Fill the form in, as somebody who pastes, and press Ctrl+Enter."""
    page = visitor.page
    expect(page.locator("#model")).to_have_value("fake")
    visitor.turn_to("create")
    for name, value in fields.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#prompts").fill(prompts)
    page.locator("#prompts").press("Control+Enter")


def job_id(visitor: Visitor) -> str:
    match = re.search(r"#job/([\w-]+)$", visitor.page.url)
    assert match
    return match[1]


def open_job(visitor: Visitor, job: str) -> None:
    visitor.page.goto(f"{visitor.url}/#job/{job}")
    visitor.turn_to("images")
    expect(visitor.page.locator("#job-head")).to_be_visible()


def test_from_paste_to_download(visitor: Visitor) -> None:
    page = visitor.page
    visitor.shoot("empty")
    generate(visitor, "a red circle\n\na blue heart", steps=40, copies=2, seed=7)
    expect(page.locator("#gallery li")).to_have_count(4)
    expect(page.locator("#gallery li[data-state=running] img[data-loaded]").first).to_be_visible()
    expect(page.locator("#job-progress")).to_have_attribute("aria-valuenow", re.compile(r"[1-9]"))
    visitor.shoot("running")
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
    made = httpx.get(f"{visitor.url}/v1/jobs/{job_id(visitor)}/images/0").content
    assert one.value.path().read_bytes() == made


def test_keyboard_and_recipe(visitor: Visitor) -> None:
    page = visitor.page
    job = submit(visitor.url, prompts=["one", "two", "three"], seed=5, steps=1)
    open_job(visitor, job)
    expect(page.locator("#job-state")).to_have_text("succeeded")
    page.locator("#gallery button").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#gallery button").nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#recipe-prompt")).to_have_text("two")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#recipe-prompt")).to_have_text("three")
    expect(page.locator("#recipe-facts")).to_contain_text("SHA-256")
    expect(page.locator("#recipe-image[data-loaded]")).to_be_visible()
    visitor.shoot("recipe")
    page.keyboard.press("Escape")
    expect(page.locator("#recipe")).to_be_hidden()
    expect(page.locator("#gallery button").nth(2)).to_be_focused()


def test_run_again_with_the_same_seed(visitor: Visitor) -> None:
    page = visitor.page
    first = submit(visitor.url, prompts=["a green star"], steps=2)
    open_job(visitor, first)
    expect(page.locator("#job-state")).to_have_text("succeeded")
    page.locator("#gallery button").first.click()
    page.get_by_role("button", name="Run again, same seed").click()
    expect(page).not_to_have_url(re.compile(first))
    expect(page.locator("#job-state")).to_have_text("succeeded")
    jobs = [httpx.get(f"{visitor.url}/v1/jobs/{job}").json() for job in (first, job_id(visitor))]
    old, new = (job["images"][0] for job in jobs)
    assert jobs[0]["id"] != jobs[1]["id"]
    assert (old["seed"], old["prompt"], old["steps"]) == (new["seed"], new["prompt"], new["steps"])


def test_cancel_then_retry(visitor: Visitor) -> None:
    page = visitor.page
    generate(visitor, "\n".join(f"a slow one {n}" for n in range(6)), steps=50)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-state")).to_have_text("cancelled")
    expect(page.locator("#gallery li[data-state=cancelled]").first).to_be_visible()
    visitor.shoot("cancelled")
    page.get_by_role("button", name="Retry unfinished").click()
    expect(page.locator("#job-state")).to_have_text("succeeded", timeout=20_000)
    expect(page.locator("#gallery li[data-state=succeeded]")).to_have_count(6)


def test_a_failed_image_says_why(visitor: Visitor) -> None:
    job = submit(visitor.url, prompts=["fine", "[refuse] this one"], steps=1)
    open_job(visitor, job)
    expect(visitor.page.locator("#job-state")).to_have_text("failed")
    failed = visitor.page.locator("#gallery li[data-state=failed]")
    expect(failed.locator(".tile-facts")).to_contain_text("told to refuse")
    visitor.shoot("failed")


def test_bad_input_is_shown_at_its_field(visitor: Visitor) -> None:
    page = visitor.page
    generate(visitor, "")
    expect(page.locator("#prompts-error")).to_have_text("Write at least one prompt.")
    visitor.refusals_expected = 2
    generate(visitor, "a fine prompt", steps=5000)
    expect(page.locator("#steps-error")).to_contain_text("200")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#steps")).to_be_focused()
    visitor.shoot("bad-input")
    generate(visitor, f"fine\n\n{'long ' * 2001}", steps=4)
    expect(page.locator("#prompts-error")).to_contain_text("Line 3:")
    expect(page.locator("#steps-error")).to_be_empty()


def test_a_thousand_images_stay_light(visitor: Visitor) -> None:
    page = visitor.page
    job = submit(
        visitor.url, prompts=[{"prompt": "many", "n": 1000}], steps=200, width=64, height=64
    )
    open_job(visitor, job)
    expect(page.locator("#gallery li").first).to_have_attribute("aria-setsize", "1000")
    page.locator("#gallery button").first.focus()
    page.keyboard.press("End")
    expect(page.locator("#gallery li[data-index='999'] button")).to_be_focused()
    longest = page.evaluate(
        """async () => {
          const pane = document.getElementById("images");
          let longest = 0, before = performance.now();
          for (let round = 0; round < 40; round++) {
            pane.scrollTop = (pane.scrollHeight * round) / 40;
            await new Promise(requestAnimationFrame);
            const now = performance.now();
            longest = Math.max(longest, now - before);
            before = now;
          }
          return longest;
        }"""
    )
    assert longest < 500, f"a frame took {longest:.0f} ms"
    assert page.locator("*").count() < MOST_ELEMENTS
    visitor.shoot("thousand")
    page.locator("#cancel").click()
    expect(page.locator("#job-state")).to_have_text("cancelled")


def test_it_is_kept_to_its_server(mill: str) -> None:
    answer = httpx.get(mill)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    tag = {"If-None-Match": answer.headers["etag"]}
    assert httpx.get(mill, headers=tag).status_code == 304
    assert httpx.get(f"{mill}/web/page.js").headers["content-type"].startswith("text/javascript")
    assert httpx.get(f"{mill}/web/nothing.js").status_code == 404
