"""The bars of running images, in a real terminal and by themselves."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from imagemill.commands.follow import Running
from imagemill.terminal.progress import ROWS, image_rows
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.terminals import Seen, in_terminal

PROMPTS = [f"picture {number} of {'a very long ' * 10}walk" for number in range(11)]


def drawn(count: int, most: int = ROWS, columns: int = 80, prompt: str = "a star") -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=columns)
    for row in image_rows([Running(n, prompt, n, 20) for n in range(count)], most):
        console.print(row)
    return out.getvalue().splitlines()


@pytest.mark.parametrize(
    ("count", "most", "lines", "last"),
    [
        (0, 8, 0, ""),
        (3, 8, 3, "2/20"),
        (8, 8, 8, "7/20"),
        (30, 8, 8, "… and 23 more"),
        (5, 0, 0, ""),
        (5, 1, 1, "… and 5 more"),
    ],
)
def test_rows_fit_the_available_lines(count: int, most: int, lines: int, last: str) -> None:
    found = drawn(count, most)
    assert len(found) == lines
    assert "".join(found[-1:]).rstrip().endswith(last)


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("prompt", ["long " * 99, "a\x1b[2Jb\nc", "星" * 80])
def test_a_row_is_one_line_without_escape_sequences(columns: int, prompt: str) -> None:
    (line,) = drawn(1, columns=columns, prompt=prompt)
    assert line.startswith("#0 ") and line.endswith("0/20")
    assert len(line) <= columns and "\x1b" not in line


def test_bars_of_running_images_move_and_disappear(tmp_path: Path) -> None:
    """Every image stays at its second step until it's finished; the terminal has 80 columns."""
    with FakeServer() as fake:
        fake.moves = True
        words = ("generate", *PROMPTS, "--out", str(tmp_path))
        ran = in_terminal(80, *words, variables={"IMAGEMILL_SERVER": fake.url})
    assert ran.code == 0, ran.said
    assert "#0" in ran.said and "picture 0 of a very long" in ran.said
    assert "1/4" in ran.said and "2/4" in ran.said and "… and 4 more" in ran.said
    seen = Seen(ran.said, 80)
    text = seen.text()
    assert seen.most_bars == 1 and seen.is_cursor_shown and ran.is_restored
    assert not any("━" in line or "… and" in line or "2/4" in line for line in text)
    assert any("11 of 11 images" in line for line in text)


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    with FakeServer() as fake:
        fake.moves = True
        words = ("generate", *PROMPTS[:2], "--out", str(tmp_path))
        where = {"IMAGEMILL_SERVER": fake.url, "TERM": "dumb"}
        ran = in_terminal(80, *words, variables=where)
    assert ran.code == 0, ran.said
    assert "\x1b" not in ran.said and "━" not in ran.said and "#0 picture" not in ran.said
