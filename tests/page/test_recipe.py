"""The dialog of an image: its recipe, and its actions."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from tests import web
from tests.page.conftest import Visitor
from tests.page.deployment import submit


def test_keyboard_and_recipe(visitor: Visitor) -> None:
    page = visitor.page
    job = submit(visitor.url, prompts=["one", "two", "three"], seed=5, steps=1)
    visitor.open_job(job)
    expect(page.locator("#job-state")).to_have_text("succeeded")
    page.locator("#gallery button").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#gallery button").nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#recipe-prompt")).to_have_text("two")
    page.get_by_role("button", name="Next").press("Enter")
    expect(page.locator("#recipe-prompt")).to_have_text("three")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#recipe-prompt")).to_have_text("two")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#recipe-prompt")).to_have_text("three")
    expect(page.locator("#recipe-image[data-loaded]")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#recipe")).to_be_hidden()
    expect(page.locator("#gallery button").nth(2)).to_be_focused()


def test_whole_recipe_is_shown_and_copied(visitor: Visitor) -> None:
    page = visitor.page
    job = submit(visitor.url, prompts=["all of it"], negative_prompt="none of it", seed=5, steps=1)
    visitor.open_job(job)
    expect(page.locator("#job-state")).to_have_text("succeeded")
    page.locator("#gallery button").first.click()
    recipe = web.get(f"{visitor.url}/v1/jobs/{job}/images/0/recipe").json()
    facts = page.locator("#recipe-facts")
    expect(facts).to_contain_text(f"torch {recipe['versions']['torch']}")
    for name in set(recipe) - {"prompt", "versions"}:
        if recipe[name] not in (None, True, False):
            expect(facts).to_contain_text(str(recipe[name]))
    expect(facts).to_contain_text("SHA-256")
    expect(page.locator("#recipe-image[data-loaded]")).to_be_visible()
    expect(page.locator("#recipe-note")).to_be_empty()
    visitor.shoot("recipe")
    page.get_by_role("button", name="Copy recipe").click()
    expect(page.locator("#recipe-copy")).to_have_text("Copied")
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == recipe


def test_a_cut_prompt_is_a_warning(visitor: Visitor) -> None:
    page = visitor.page
    visitor.open_job(submit(visitor.url, prompts=["word " * 78, "short"], seed=5, steps=1))
    expect(page.locator("#job-state")).to_have_text("succeeded")
    expect(page.locator(".tile-facts").nth(0)).to_have_text("#1 · seed 5 · see warning")
    expect(page.locator(".tile-facts").nth(1)).not_to_contain_text("warning")
    page.locator("#gallery button").first.click()
    warning = page.locator("#recipe-warnings")
    expect(warning).to_have_text("the model reads 77 tokens of a prompt and cuts the rest")
    page.get_by_role("button", name="Next").press("Enter")
    expect(warning).to_be_hidden()


def test_failed_recipe_is_reported_and_partly_copied(visitor: Visitor) -> None:
    page = visitor.page

    def refuse(route: Route) -> None:
        route.fulfill(status=503, json={"detail": "the store does not answer"})

    page.route("**/recipe", refuse)
    visitor.refusals = [("/recipe", "503")]
    visitor.open_job(submit(visitor.url, prompts=["half"], seed=5, steps=1))
    expect(page.locator("#job-state")).to_have_text("succeeded")
    page.locator("#gallery button").first.click()
    expect(page.locator("#recipe-note")).to_contain_text("the store does not answer")
    expect(page.locator("#recipe-facts")).to_contain_text("Guidance scale")
    page.get_by_role("button", name="Copy recipe").click()
    expect(page.locator("#recipe-copy")).to_have_text("Partly copied")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert (copied["model"], copied["prompt"], copied["seed"]) == ("fake", "half", 5)


def test_running_image_says_when_its_recipe_is_available(visitor: Visitor, hold: Path) -> None:
    page = visitor.page
    visitor.open_job(submit(visitor.url, prompts=["not yet [hold]"], steps=4))
    page.locator("#gallery li[data-state=running] button").click()
    expect(page.locator("#recipe-note")).to_contain_text("is available once the image is finished")
    expect(page.locator("#recipe-facts")).not_to_contain_text("Scheduler")
    hold.unlink()
    expect(page.locator("#recipe-facts")).to_contain_text("Scheduler")
    expect(page.locator("#recipe-note")).to_be_empty()


@pytest.mark.parametrize("way", ["the job", "the image", "the form"])
def test_run_again_sends_the_same_fields(visitor: Visitor, way: str) -> None:
    """With the same seed, format and reproducibility, even for an image that failed."""
    page = visitor.page
    visitor.sees_failures = True
    first = submit(
        visitor.url, prompts=["[refuse] a star"], steps=2, format="webp", reproducible=False
    )
    visitor.open_job(first)
    expect(page.locator("#job-state")).to_have_text("failed")
    if way == "the job":
        page.get_by_role("button", name="Run again").click()
    else:
        page.locator("#gallery button").first.click()
    if way == "the image":
        page.get_by_role("button", name="Run again, same seed").click()
    if way == "the form":
        page.get_by_role("button", name="Edit in form").click()
        expect(page.locator("#reproducible")).to_be_visible()
        expect(page.locator("#reproducible")).not_to_be_checked()
        page.locator("#prompts").press("Control+Enter")
    expect(page).not_to_have_url(re.compile(first))
    jobs = [web.get(f"{visitor.url}/v1/jobs/{job}").json() for job in (first, visitor.job_id())]
    old, new = (job["images"][0] for job in jobs)
    assert jobs[0]["id"] != jobs[1]["id"]
    assert (new["format"], new["reproducible"]) == ("webp", False)
    for name in ("seed", "prompt", "steps", "width", "height", "guidance_scale"):
        assert old[name] == new[name]
