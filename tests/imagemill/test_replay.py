"""`imagemill replay` against a server in memory, and its comparison of two pictures."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from imagemill.commands.recipe import read_recipe
from imagemill.commands.replay import compare
from tests.imagemill import test_recipe
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.test_generate import run, server
from tests.imagemill.test_recipe import request

__all__ = ["server"]


def picture(path: Path, bucket: int = 8) -> Path:
    return test_recipe.picture(path, replace(request(), width=32, height=32), bucket)


def dotted(path: Path) -> Path:
    """The same file with one pixel that differs by 3 in its green."""
    made = picture(path)
    with Image.open(made) as image:
        image.load()
        other = image.copy()
    other.putpixel((3, 4), (0, 3, 0))
    made.unlink()
    return test_recipe.png(made, imagemill=str(image.text["imagemill"]), picture=other)


def test_the_same_picture_is_bit_equal_whatever_its_bucket(tmp_path: Path) -> None:
    one, other = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", bucket=2)
    verdict = compare(one, read_recipe(one), other, None)
    assert verdict.is_equal
    assert verdict.sentences()[1:] == ["  bucket: 8 then, 2 now"]


def test_the_largest_difference_is_told(tmp_path: Path) -> None:
    one, other = picture(tmp_path / "a.png"), dotted(tmp_path / "b.png")
    verdict = compare(one, read_recipe(one), other, None)
    assert (verdict.largest, verdict.differing) == (3, 1)
    assert "1 of 1024 pixels differ, by 3 of 255" in verdict.sentences()[0]
    assert "the recipes are the same" in verdict.sentences()[1]


def test_another_size_is_not_equal(tmp_path: Path) -> None:
    one, other = picture(tmp_path / "a.png"), test_recipe.picture(tmp_path / "b.png", request())
    verdict = compare(one, read_recipe(one), other, None)
    assert verdict.largest is None
    assert verdict.document()["differences"] == {"height": {"then": 32, "now": 16}}


def test_the_whole_recipe_is_asked_for_again(server: FakeServer, tmp_path: Path) -> None:
    file, out = picture(tmp_path / "a.png"), tmp_path / "again.png"
    server.pictures = [file.read_bytes()]
    done = run("replay", file, "--out", out)
    assert done.exit_code == 0, done.output
    assert "bit-equal: all 1024 pixels" in done.output
    assert out.read_bytes() == file.read_bytes()
    [body] = server.bodies
    [prompt] = body.pop("prompts")
    wanted = {**asdict(read_recipe(file).request)}
    assert wanted.pop("negative_prompt") is None
    assert {**prompt, **body} == wanted


def test_another_picture_is_exit_code_1(server: FakeServer, tmp_path: Path) -> None:
    server.pictures = [dotted(tmp_path / "other.png").read_bytes()]
    done = run("replay", picture(tmp_path / "a.png"), "--json")
    assert done.exit_code == 1
    assert '"largest": 3' in done.stdout


def test_what_cannot_be_made_again_is_one_sentence(server: FakeServer, tmp_path: Path) -> None:
    server.fails = {"a red circle"}
    done = run("replay", picture(tmp_path / "a.png"))
    assert done.exit_code == 1
    assert "could not be made again: the latents are not numbers" in done.output
    nowhere = run("replay", picture(tmp_path / "a.png"), "--out", tmp_path / "no" / "b.png")
    assert (nowhere.exit_code, len(server.bodies)) == (2, 1)


def test_a_file_without_a_recipe_asks_nobody(server: FakeServer, tmp_path: Path) -> None:
    done = run("replay", test_recipe.png(tmp_path / "a.png"))
    assert done.exit_code == 1
    assert server.calls == {}


@pytest.mark.parametrize("command", ["inspect", "replay"])
def test_help(command: str) -> None:
    assert "recipe" in run(command, "--help").output
