"""`imagemill replay` against a fake server, and its comparison of two images."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from imagemill.commands.replay import compare
from jobs.recipe import read_recipe
from tests.imagemill import test_inspect
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.test_generate import run, server
from tests.imagemill.test_inspect import request

__all__ = ["server"]


def picture(path: Path, bucket: int = 8) -> Path:
    return test_inspect.picture(path, replace(request(), width=32, height=32), bucket)


def dotted(path: Path) -> Path:
    """The same file, except that one pixel's green differs by 3."""
    file = picture(path)
    with Image.open(file) as image:
        image.load()
        other = image.copy()
    other.putpixel((3, 4), (0, 3, 0))
    file.unlink()
    return test_inspect.png(file, imagemill=str(image.text["imagemill"]), picture=other)


def test_identical_images_are_bit_equal_in_any_bucket(tmp_path: Path) -> None:
    one, other = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", bucket=2)
    verdict = compare(one, read_recipe(one), other, None)
    assert verdict.is_equal
    assert verdict.sentences()[1:] == ["  bucket: was 8, now 2"]


def test_the_largest_difference_is_reported(tmp_path: Path) -> None:
    one, other = picture(tmp_path / "a.png"), dotted(tmp_path / "b.png")
    verdict = compare(one, read_recipe(one), other, None)
    assert (verdict.largest, verdict.differing) == (3, 1)
    assert "1 of 1024 pixels differ, by at most 3 of 255" in verdict.sentences()[0]
    assert "the recipes match" in verdict.sentences()[1]


def test_different_sizes_are_not_equal(tmp_path: Path) -> None:
    one, other = picture(tmp_path / "a.png"), test_inspect.picture(tmp_path / "b.png", request())
    verdict = compare(one, read_recipe(one), other, None)
    assert verdict.largest is None
    assert verdict.document()["differences"] == {"height": {"then": 32, "now": 16}}


def test_the_whole_recipe_is_submitted(server: FakeServer, tmp_path: Path) -> None:
    file, out = picture(tmp_path / "a.png"), tmp_path / "again.png"
    server.pictures = [file.read_bytes()]
    done = run("replay", file, "--out", out)
    assert done.exit_code == 0, done.output
    assert "bit-equal: all 1024 pixels" in done.output
    assert out.read_bytes() == file.read_bytes()
    [body] = server.bodies
    [prompt] = body.pop("prompts")
    expected = asdict(read_recipe(file).request)
    assert expected.pop("negative_prompt") is None
    assert {**prompt, **body} == expected


def test_a_different_image_exits_with_1(server: FakeServer, tmp_path: Path) -> None:
    server.pictures = [dotted(tmp_path / "other.png").read_bytes()]
    done = run("replay", picture(tmp_path / "a.png"), "--json")
    assert done.exit_code == 1
    assert '"largest": 3' in done.stdout


def test_a_failed_replay_is_one_sentence(server: FakeServer, tmp_path: Path) -> None:
    server.fails = {"a red circle"}
    done = run("replay", picture(tmp_path / "a.png"))
    assert done.exit_code == 1
    assert "couldn't generate it again: the latents are not numbers" in done.output
    nowhere = run("replay", picture(tmp_path / "a.png"), "--out", tmp_path / "no" / "b.png")
    assert (nowhere.exit_code, len(server.bodies)) == (2, 1)


def test_a_file_without_a_recipe_sends_no_request(server: FakeServer, tmp_path: Path) -> None:
    done = run("replay", test_inspect.png(tmp_path / "a.png"))
    assert done.exit_code == 1
    assert server.calls == {}


@pytest.mark.parametrize("command", ["inspect", "replay"])
def test_help(command: str) -> None:
    assert "recipe" in run(command, "--help").output
