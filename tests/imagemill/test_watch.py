"""`generate --watch` in a pseudo-terminal, as a person sees it; and nothing of it in a pipe."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from imagemill.watch import GAP, NARROW, WIDE, Strip, Tile
from tests.imagemill.fake_server import FakeServer

ORANGE = (250, 130, 10)


def jpeg(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(out, "JPEG", quality=100, subsampling=0)
    return out.getvalue()


def in_terminal(columns: int, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run the command in a terminal of that width; its exit code and all that was written."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "imagemill", *arguments],
        env={**kept, "TERM": "xterm-256color", "COLORTERM": "truecolor", **variables},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        said += piece
        if not piece:
            break
    os.close(ours)
    return process.wait(30), said.decode()


def test_a_terminal_shows_previews_then_pictures(tmp_path: Path) -> None:
    with FakeServer() as fake:
        fake.preview = jpeg(ORANGE)
        words = ("generate", "one", "two", "--watch", "--out", str(tmp_path))
        code, said = in_terminal(80, *words, IMAGEMILL_SERVER=fake.url)
    assert code == 0, said
    colours = {tuple(map(int, one)) for one in re.findall(r"38;2;(\d+);(\d+);(\d+)", said)}
    assert any(max(abs(a - b) for a, b in zip(one, ORANGE, strict=True)) < 4 for one in colours)
    assert (7 * 53 % 256, 7 * 101 % 256, 7 * 197 % 256) in colours  # the picture of seed 7
    assert "#0 step 2/4" in said
    assert "2 of 2 images" in said


def test_a_pipe_gets_no_pictures(tmp_path: Path) -> None:
    with FakeServer() as fake:
        words = ["generate", "one", "--watch", "--out", str(tmp_path), "--server", fake.url]
        done = subprocess.run(
            [sys.executable, "-m", "imagemill", *words], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert "▀" not in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize(("columns", "shown"), [(20, 1), (80, 3), (120, 4), (400, 8)])
def test_as_many_tiles_as_fit_and_no_line_is_too_long(columns: int, shown: int) -> None:
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
