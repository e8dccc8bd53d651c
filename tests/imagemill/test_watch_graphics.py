"""`generate --watch` with real images, in pseudo-terminals that support them."""

import io
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageOps
from rich.console import Console

from imagemill.commands.follow import News, Running
from imagemill.terminal.detect import Pictures, Screen
from imagemill.terminal.watch_graphics import GraphicsPreviewBar
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.terminals import CELL, Ran, Seen, in_terminal
from tests.waiting import PATIENCE

KITTY = {"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}
KITTY_SAYS = b"\x1b_Gi=31;OK\x1b\\\x1b[?62;c"
SIXEL_SAYS = b"\x1b[?62;4;22c"
WAYS = {
    "kitty": (KITTY, KITTY_SAYS),
    "iterm2": ({"TERM_PROGRAM": "iTerm.app"}, b""),
    "sixel": ({"TERM": "foot"}, SIXEL_SAYS),
}
BEGINS = {"kitty": "\x1b_Ga=T", "iterm2": "\x1b]1337;File=", "sixel": "\x1bP0;1;0q"}
PROMPTS = ("one", "two", "three", "four")

RAMP = Image.linear_gradient("L").resize((64, 64))
IMAGES = [Image.merge("RGB", (RAMP.rotate(90 * turn), RAMP, RAMP.rotate(180))) for turn in range(4)]
PREVIEW = Image.new("RGB", (64, 64), (250, 130, 10))


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def is_like(shown: Image.Image, picture: Image.Image) -> bool:
    """Whether both are the same, within the precision of 256 colours in percent."""
    expected = ImageOps.pad(picture, shown.size)
    bands = ImageChops.difference(shown, expected).split()
    return all(band.point(lambda level: 255 * (level > 24)).getbbox() is None for band in bands)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        fake.pictures = [png(picture) for picture in IMAGES]
        yield fake


def at(server: FakeServer, variables: Mapping[str, str] = {}) -> dict[str, str]:
    return {"IMAGEMILL_SERVER": server.url, **variables}


def watch(
    server: FakeServer, out: Path, way: str, columns: int = 80, interrupt_at: str | None = None
) -> Ran:
    variables, answer = WAYS[way]
    words = ("generate", *PROMPTS, "--watch", "--out", str(out))
    where = at(server, variables)
    return in_terminal(columns, *words, answer=answer, interrupt_at=interrupt_at, variables=where)


@pytest.mark.parametrize("way", WAYS)
def test_previews_then_images_above_an_intact_bar(
    server: FakeServer, tmp_path: Path, way: str
) -> None:
    """Three of four fit; at the end they're side by side, each above its caption."""
    server.preview = png(PREVIEW)
    ran = watch(server, tmp_path, way)
    assert ran.code == 0, ran.said
    seen = Seen(ran.said, 80)
    assert any(is_like(shown.picture, PREVIEW) for shown in seen.painted)
    stay = sorted(seen.pictures, key=lambda shown: shown.column)
    assert [shown.column for shown in stay] == [0, 26, 52]
    below = seen.text()[stay[0].row + 12]
    for shown, index in zip(stay, below.split(), strict=True):
        assert shown.row == stay[0].row
        assert is_like(shown.picture, IMAGES[int(index.removeprefix("#"))])
    assert seen.most_bars == 1
    assert not any("━" in line for line in seen.text())
    assert any("4 of 4 images" in line for line in seen.text())
    assert seen.is_cursor_shown and ran.is_restored and ran.unread == 0


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_leaves_the_terminal_as_it_was(server: FakeServer, tmp_path: Path, way: str) -> None:
    """The first image is already painted when the signal arrives, and stays."""
    server.preview = png(PREVIEW)
    server.holds = True
    ran = watch(server, tmp_path, way, columns=120, interrupt_at=BEGINS[way])
    assert ran.code == 130, ran.said
    seen = Seen(ran.said, 120)
    assert seen.is_cursor_shown and ran.is_restored and ran.unread == 0
    assert seen.most_bars == 1
    text = seen.text()
    assert not any("━" in line for line in text)
    assert sum(line.startswith("cancelling unfinished images") for line in text) == 1
    assert any("to resume: imagemill generate --resume job-1" in line for line in text)
    assert server.jobs["job-1"]["counts"]["cancelled"] == 4
    assert [shown.column for shown in seen.pictures] == [0, 26, 52, 78]


def news(*running: int, files: dict[int, Path] | None = None) -> News:
    steps = tuple(Running(index, "a prompt", 2, 4) for index in running)
    return News(9, len(files or {}), 0, 0.5, None, None, "", steps, files or {})


@pytest.mark.parametrize("kind", [Pictures.KITTY, Pictures.ITERM2, Pictures.SIXEL])
def test_messages_and_changes_do_not_break_the_layout(kind: Pictures, tmp_path: Path) -> None:
    """Messages go above the images; an image that disappears leaves no gap."""
    (tmp_path / "a.png").write_bytes(png(IMAGES[0]))
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=30, color_system=None)
    with GraphicsPreviewBar(console, Screen(kind, CELL)) as view:
        view.update(news(1, 2, 3))
        view.say("a sentence that is longer than one line of the terminal has room for, " * 2)
        view.update(news(2, files={0: tmp_path / "a.png"}))
        view.say("[not markup]")
    seen = Seen(out.getvalue().replace("\n", "\r\n"), 80)
    text = seen.text()
    assert [line.split()[0] for line in text if line] == ["a", "that", "[not", "#2"]
    assert text[-1].split() == ["#2", "step", "2/4", "#0"]
    top = text.index("[not markup]") + 1
    assert [(shown.row, shown.column) for shown in seen.pictures] == [(top, 0), (top, 26)]
    assert len(text) == top + 13
    assert is_like(seen.pictures[1].picture, IMAGES[0])
    assert seen.most_bars == 1 and seen.is_cursor_shown


def test_a_low_terminal_shows_only_the_bar(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=9, color_system=None)
    with GraphicsPreviewBar(console, Screen(Pictures.KITTY, CELL)) as view:
        view.update(news(1, 2))
    seen = Seen(out.getvalue().replace("\n", "\r\n"), 80)
    assert (seen.painted, seen.text(), seen.most_bars) == ([], [""], 1)


@pytest.mark.parametrize(
    ("variables", "answer"),
    [
        ({}, b"\x1b[?62;22c"),
        (KITTY, b"\x1b[?62;22c"),
        ({**KITTY, "TMUX": "/tmp/tmux-0/default,1,0"}, b""),
        ({"TERM": "screen-256color", "TERM_PROGRAM": "iTerm.app"}, b""),
    ],
)
def test_terminals_without_image_support_get_half_blocks(
    server: FakeServer, tmp_path: Path, variables: dict[str, str], answer: bytes
) -> None:
    words = ("generate", "one", "--watch", "--out", str(tmp_path))
    ran = in_terminal(80, *words, answer=answer, variables=at(server, variables))
    assert ran.code == 0, ran.said
    assert "▀" in ran.said
    assert not any(begin in ran.said for begin in BEGINS.values())
    assert ran.is_restored and ran.unread == 0


def test_an_explicit_choice_is_used_without_a_query(server: FakeServer, tmp_path: Path) -> None:
    words = ("generate", "one", "--pictures", "kitty", "--out", str(tmp_path))
    ran = in_terminal(80, *words, variables=at(server, {"TMUX": "/tmp/tmux-0/default,1,0"}))
    assert ran.code == 0, ran.said
    assert "\x1b[c" not in ran.said
    assert is_like(Seen(ran.said, 80).pictures[0].picture, IMAGES[0])


def test_prompts_from_a_pipe(server: FakeServer, tmp_path: Path) -> None:
    """The terminal is queried all the same."""
    words = ("generate", "--file", "-", "--watch", "--out", str(tmp_path))
    variables, answer = WAYS["kitty"]
    ran = in_terminal(80, *words, stdin="one\n", answer=answer, variables=at(server, variables))
    assert ran.code == 0, ran.said
    assert is_like(Seen(ran.said, 80).pictures[0].picture, IMAGES[0])
    assert ran.is_restored and ran.unread == 0


def test_unread_input_is_left_for_the_shell(server: FakeServer, tmp_path: Path) -> None:
    words = ("generate", "one", "--watch", "--out", str(tmp_path))
    ran = in_terminal(80, *words, typed=b"ls\n", variables=at(server))
    assert (ran.code, "\x1b[c" in ran.said, ran.unread) == (0, False, 3)


def test_no_answer_means_half_blocks(server: FakeServer, tmp_path: Path) -> None:
    words = ("generate", "one", "--watch", "--out", str(tmp_path))
    ran = in_terminal(80, *words, answer=b"", variables=at(server))
    assert (ran.code, "▀" in ran.said, ran.is_restored) == (0, True, True)


@pytest.mark.parametrize("kind", ["auto", "kitty", "iterm2", "sixel", "blocks"])
def test_a_pipe_gets_no_escape_sequences(server: FakeServer, tmp_path: Path, kind: str) -> None:
    words = ["generate", "one", "--watch", "--pictures", kind, "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "imagemill", *words, "--server", server.url],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 images" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr and "▀" not in done.stdout
