"""`generate --watch` in a pseudo-terminal without image support."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from imagemill.commands.follow import News
from imagemill.terminal.watch import GAP, MOST, NARROW, WIDE, PreviewBar, Strip, Tile
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.terminals import in_terminal

ORANGE = (250, 130, 10)


def jpeg(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(out, "JPEG", quality=100, subsampling=0)
    return out.getvalue()


def test_previews_then_images(tmp_path: Path) -> None:
    with FakeServer() as fake:
        fake.preview = jpeg(ORANGE)
        words = ("generate", "one", "two", "--watch", "--out", str(tmp_path))
        ran = in_terminal(80, *words, variables={"IMAGEMILL_SERVER": fake.url})
    said = ran.said
    assert ran.code == 0, said
    colours = {tuple(map(int, one)) for one in re.findall(r"38;2;(\d+);(\d+);(\d+)", said)}
    assert any(max(abs(a - b) for a, b in zip(one, ORANGE, strict=True)) < 4 for one in colours)
    assert (7 * 53 % 256, 7 * 101 % 256, 7 * 197 % 256) in colours  # the picture of seed 7
    assert "#0 step 2/4" in said
    assert "#0 one" not in said.split("succeeded")[0]  # captions instead of bars
    assert "2 of 2 images" in said


def test_only_images_that_can_be_shown_are_kept(tmp_path: Path) -> None:
    files = {index: tmp_path / f"{index}.png" for index in range(20)}
    for path in files.values():
        Image.new("RGB", (9, 9), ORANGE).save(path)
    view = PreviewBar(Console(file=io.StringIO(), force_terminal=True, width=400, height=40))
    for count in range(1, 21):
        known = {index: files[index] for index in range(count)}
        view.update(News(20, count, 0, count / 20, None, None, "", (), known))
    assert [tile.caption for tile in view.tiles()] == [f"#{n}" for n in range(19, 11, -1)]
    assert len(view._finished) == MOST


@pytest.mark.parametrize(("columns", "shown"), [(20, 1), (80, 3), (120, 4), (400, 8)])
def test_tiles_fit_the_width(columns: int, shown: int) -> None:
    tiles = [Tile(Image.new("RGB", (9, 5), ORANGE), f"#{n}") for n in range(9)]
    tiles[0] = Tile(None, "#0 step 0/8")
    out = io.StringIO()
    Console(file=out, width=columns, height=40).print(Strip(tiles))
    lines = out.getvalue().splitlines()
    side = min(WIDE, columns)
    assert len(lines) == side // 2 + 1
    assert max(map(len, lines)) == shown * side + (shown - 1) * GAP <= columns
    assert lines[-1].count("#") == shown


def test_a_low_terminal_gets_small_tiles() -> None:
    out = io.StringIO()
    Console(file=out, width=80, height=20).print(Strip([Tile(None, "#0")]))
    assert len(out.getvalue().splitlines()) == NARROW // 2 + 1
