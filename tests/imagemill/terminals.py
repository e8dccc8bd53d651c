"""Terminals for tests: run the command in a real one, and see what a person would see.

`in_terminal` runs the command in a pseudo-terminal that answers queries. `Seen` emulates a
terminal, images included. It's strict: it knows only the sequences that we write and fails on all
others. `sixels` decodes sixel data.
"""

import base64
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from tests.waiting import PATIENCE

ROWS, CELL = 40, (10, 20)
PLAIN = b"\x1b[?62;22c"
"""The answer of a terminal without image support."""

PROGRAM = """
from imagemill import cli
from imagemill.terminal import detect
detect.PATIENCE = {}
cli.main()
"""
"""The command, which waits for the terminal's answer as long as the test does, or briefly if there
won't be one."""

_KEPT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TMUX", "STY", "ZELLIJ")
    and not name.startswith(("TERM", "KITTY", "TTY_"))
}


@dataclass(frozen=True)
class Ran:
    """A command's exit code and output, and the state in which it left the terminal."""

    code: int
    said: str
    is_restored: bool
    unread: int


def in_terminal(
    columns: int,
    *arguments: str,
    answer: bytes = PLAIN,
    interrupt_at: str | None = None,
    stdin: str | None = None,
    typed: bytes = b"",
    variables: Mapping[str, str],
) -> Ran:
    """Run the command; interrupt it once it has written `interrupt_at`.

    `stdin` is piped in; without it, standard input is the terminal, with `typed` as unread input.
    """
    ours, theirs = pty.openpty()
    size = ROWS, columns, columns * CELL[0], ROWS * CELL[1]
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size))
    before = termios.tcgetattr(theirs)
    os.write(ours, typed)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(PATIENCE if answer else 0.2), *arguments],
        env={**_KEPT, "TERM": "xterm-256color", "COLORTERM": "truecolor", **variables},
        stdin=theirs if stdin is None else subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
    )
    if process.stdin is not None:
        with process.stdin as pipe:
            pipe.write((stdin or "").encode())
    said, asked, deadline = b"", False, time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        is_over = process.poll() is not None
        if select.select([ours], [], [], 0.02)[0]:
            said += os.read(ours, 65536)
        elif is_over:
            break
        if b"\x1b[c" in said and not asked:
            asked = True
            os.write(ours, answer)
        if interrupt_at is not None and interrupt_at.encode() in said:
            interrupt_at = None
            process.send_signal(signal.SIGINT)
    process.kill()
    unread = struct.unpack("i", fcntl.ioctl(theirs, termios.FIONREAD, bytes(4)))[0]
    is_restored = termios.tcgetattr(theirs) == before
    os.close(theirs)
    os.close(ours)
    return Ran(process.wait(), said.decode(), is_restored, unread)


@dataclass
class Shown:
    """An image on the screen: its upper left character, its size in characters, its pixels."""

    row: int
    column: int
    columns: int
    rows: int
    picture: Image.Image
    number: int | None = None


_TOKEN = re.compile(
    r"\x1b_G(?P<kitty>[^\x1b]*)\x1b\\"
    r"|\x1b\]1337;File=(?P<iterm2>[^\x07]*)\x07"
    r"|\x1bP(?P<sixel>[^\x1b]*)\x1b\\"
    r"|\x1b\[(?P<numbers>[?\d;]*)(?P<order>[A-Za-z])"
    r"|\x1b(?P<cursor>[78])|(?P<move>[\r\n])|(?P<text>[^\x1b\r\n\x00-\x08]+)"
)


@dataclass
class Seen:
    """The screen after `said` was written to it."""

    said: str
    columns: int
    cell: tuple[int, int] = CELL
    row: int = 0
    column: int = 0
    saved: tuple[int, int] = (0, 0)
    is_cursor_shown: bool = True
    pictures: list[Shown] = field(default_factory=list)
    painted: list[Shown] = field(default_factory=list)
    most_bars: int = 0
    _partial: dict[str, str] | None = None
    _payload: str = ""

    def __post_init__(self) -> None:
        self.lines = [" " * self.columns for _ in range(ROWS)]
        place = 0
        while place < len(self.said):
            token = _TOKEN.match(self.said, place)
            assert token is not None, f"what is {self.said[place : place + 40]!r}?"
            self._play(token)
            place = token.end()
            self.most_bars = max(
                self.most_bars, sum("images" in x and "%" in x for x in self.lines)
            )

    def text(self) -> list[str]:
        """The lines, without trailing blank ones."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip().split("\n")

    def _play(self, token: re.Match[str]) -> None:
        if token["kitty"] is not None:
            self._kitty(token["kitty"])
        elif token["iterm2"] is not None:
            self._iterm2(token["iterm2"])
        elif token["sixel"] is not None:
            self._sixel(token["sixel"])
        elif token["order"]:
            self._order(token["order"], token["numbers"])
        elif token["cursor"] == "7":
            self.saved = self.row, self.column
        elif token["cursor"] == "8":
            self.row, self.column = self.saved
        elif token["move"] == "\r":
            self.column = 0
        elif token["move"] == "\n":
            self._down()
        else:
            self._write(token["text"])

    def _order(self, order: str, numbers: str) -> None:
        count = int(numbers) if numbers.isdecimal() else 1
        if order == "A":
            self.row = max(0, self.row - count)
        elif order == "C":
            self.column += count
        elif order == "K":
            assert numbers == "2"
            self._erase(self.row, self.row + 1)
        elif order == "J":
            assert (numbers, self.column) == ("", 0)
            self._erase(self.row, ROWS)
        elif order in "hl" and numbers == "?25":
            self.is_cursor_shown = order == "h"
        else:
            assert order in "mct", f"what is {numbers}{order}?"

    def _write(self, text: str) -> None:
        room = self.columns - self.column
        if len(text) > room:
            assert self.is_cursor_shown, f"{text!r} runs over the edge of a live display"
            self._write(text[:room])
            self._down()
            self.column = 0
            self._write(text[room:])
            return
        line, end = self.lines[self.row], self.column + len(text)
        self.lines[self.row] = line[: self.column] + text + line[end:]
        self._uncover(self.row, self.row + 1, self.column, end)
        self.column = end

    def _down(self) -> None:
        if self.row < ROWS - 1:
            self.row += 1
            return
        self.lines = [*self.lines[1:], " " * self.columns]
        for shown in self.pictures:
            shown.row -= 1

    def _erase(self, first: int, last: int) -> None:
        for row in range(first, last):
            self.lines[row] = " " * self.columns
        self._uncover(first, last, 0, self.columns)

    def _uncover(self, top: int, bottom: int, left: int, right: int) -> None:
        """Remove the images that text overwrites, except kitty's."""
        self.pictures = [
            shown
            for shown in self.pictures
            if shown.number is not None
            or shown.row >= bottom
            or shown.row + shown.rows <= top
            or shown.column >= right
            or shown.column + shown.columns <= left
        ]

    def _kitty(self, command: str) -> None:
        keys, _, payload = command.partition(";")
        given = dict(key.split("=") for key in keys.split(","))
        assert len(payload) <= 4096
        if given.get("a") == "q":
            return
        assert given["q"] == "2"
        if given.get("a") == "d":
            self.pictures = [x for x in self.pictures if x.number != int(given["i"])]
            return
        if self._partial is None:
            self._partial, self._payload = given, ""
        self._payload += payload
        if given["m"] == "0":
            first, self._partial = self._partial, None
            assert (first["a"], first["f"], first["C"]) == ("T", "100", "1")
            number, size = int(first["i"]), (int(first["c"]), int(first["r"]))
            self.pictures = [x for x in self.pictures if x.number != number]
            self._show(*size, opened(self._payload), number)

    def _iterm2(self, command: str) -> None:
        keys, _, payload = command.partition(":")
        given = dict(key.split("=") for key in keys.split(";"))
        assert given["inline"] == "1"
        assert int(given["size"]) == len(base64.b64decode(payload, validate=True))
        self._show(int(given["width"]), int(given["height"]), opened(payload), None)
        self.row, self.column = self.row + int(given["height"]) - 1, self.columns - 1

    def _sixel(self, data: str) -> None:
        picture = sixels(data)
        columns, rows = -(-picture.width // self.cell[0]), -(-picture.height // self.cell[1])
        self._show(columns, rows, picture, None)
        self.row, self.column = self.row + rows - 1, 0

    def _show(self, columns: int, rows: int, picture: Image.Image, number: int | None) -> None:
        assert self.row + rows < ROWS and self.column + columns <= self.columns
        if number is None:
            self._uncover(self.row, self.row + rows, self.column, self.column + columns)
        shown = Shown(self.row, self.column, columns, rows, picture, number)
        self.pictures.append(shown)
        self.painted.append(shown)


def opened(payload: str) -> Image.Image:
    """Decode an image from base64."""
    with Image.open(io.BytesIO(base64.b64decode(payload, validate=True))) as picture:
        assert picture.format == "PNG"
        return picture.convert("RGB")


def sixels(data: str) -> Image.Image:
    """Decode sixel data; every pixel must be painted."""
    head, _, body = data.partition("q")
    assert head == "0;1;0"
    raster = re.match(r'"1;1;(\d+);(\d+)', body)
    assert raster is not None
    width, height = int(raster[1]), int(raster[2])
    colours: dict[int, tuple[int, ...]] = {}
    pixels: dict[tuple[int, int], tuple[int, ...]] = {}
    colour, x, y = 0, 0, 0
    token = r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|(?:!(\d+))?([?-~])|([$-])"
    for found in re.finditer(token, body[raster.end() :]):
        if found[1]:
            colour = int(found[1])
            if found[2]:
                colours[colour] = tuple(round(int(found[n]) * 255 / 100) for n in (2, 3, 4))
        elif found[6]:
            bits = ord(found[6]) - ord("?")
            for _ in range(int(found[5] or 1)):
                pixels.update({(x, y + n): colours[colour] for n in range(6) if bits >> n & 1})
                x += 1
        else:
            x, y = 0, y + 6 * (found[7] == "-")
    assert pixels.keys() == {(x, y) for x in range(width) for y in range(height)}
    picture = Image.new("RGB", (width, height))
    for place, value in pixels.items():
        picture.putpixel(place, value)
    return picture
