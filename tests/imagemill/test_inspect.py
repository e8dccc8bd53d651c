"""Reading recipes from pictures and from other files, and `imagemill inspect`."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from imagemill.cli import app
from jobs.errors import NoRecipe
from jobs.recipe import Recipe, read_recipe, save
from jobs.request import ImageFormat, ImageRequest


def request(format: ImageFormat = "png") -> ImageRequest:
    return ImageRequest("demo", "a red circle", 7, 32, 16, 4, 2.5, None, format)


def picture(path: Path, image_request: ImageRequest, bucket: int = 8) -> Path:
    """A file as a worker writes it."""
    versions = {"imagemill": "0.1", "torch": "2.13.0"}
    made_with = {"scheduler": "Euler", "bucket": bucket, "versions": versions}
    blank = Image.new("RGB", (image_request.width, image_request.height))
    path.write_bytes(save(blank, Recipe(image_request, made_with)))
    return path


def png(path: Path, picture: Image.Image | None = None, **chunks: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in chunks.items():
        info.add_itxt(name, text)
    (picture or Image.new("RGB", (8, 8))).save(path, pnginfo=info)
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_differences_have_both_values(tmp_path: Path) -> None:
    one = read_recipe(picture(tmp_path / "a.png", request()))
    other = read_recipe(picture(tmp_path / "b.png", request("webp"), bucket=2))
    assert one.differences(one) == {}
    assert one.facts()["torch version"] == "2.13.0"
    assert one.differences(other) == {"format": ("png", "webp"), "bucket": (8, 2)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no imagemill recipe"),
        ("a dog", "isn't an imagemill recipe"),
        ("[1]", "isn't an imagemill recipe"),
        ('{"prompt": "a"}', "lacks `model`"),
        ("7", "isn't an imagemill recipe"),
        ("seed", "an invalid `seed`"),
    ],
)
def test_invalid_descriptions_are_refused(tmp_path: Path, text: str, said: str) -> None:
    if text == "seed":
        text = json.dumps({**json.loads(request().to_json()), "seed": True})
    with pytest.raises(NoRecipe, match=said):
        read_recipe(png(tmp_path / "a.png", imagemill=text))


def test_unreadable_images_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    whole = picture(tmp_path / "whole.png", request()).read_bytes()
    (tmp_path / "short.png").write_bytes(whole[:40])
    png(tmp_path / "bomb.png", imagemill="x" * (2 * 2**20))
    (tmp_path / "folder").mkdir()
    for name in ("text.png", "short.png", "bomb.png", "folder", "none.png"):
        done = run("inspect", tmp_path / name)
        assert (done.exit_code, done.output.count("error:")) == (1, 1), name
        assert "Traceback" not in done.output


def test_inspect_shows_valid_files_and_reports_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    good, bad = picture(tmp_path / "a.png", request()), png(tmp_path / "b.png")
    done = run("inspect", good, bad)
    assert done.exit_code == 1
    assert "a red circle" in done.output
    assert f"{bad}: this image has no imagemill recipe" in done.output
    assert run("inspect", good).exit_code == 0


def test_inspect_as_json(tmp_path: Path) -> None:
    done = run("inspect", picture(tmp_path / "a.png", request()), "--json")
    [found] = json.loads(done.stdout)
    assert (found["file"], found["seed"]) == (str(tmp_path / "a.png"), 7)


def test_a_recipe_prints_no_escape_sequences(tmp_path: Path) -> None:
    evil = {**json.loads(request().to_json()), "prompt": "\x1b]0;mine\x07", "\x1b[2J": 1}
    done = run("inspect", png(tmp_path / "a.png", imagemill=json.dumps(evil)))
    assert done.exit_code == 0
    assert "\x1b" not in done.output
