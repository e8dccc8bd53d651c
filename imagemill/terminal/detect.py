"""Detects how a terminal can show images: with one of three protocols, or with half blocks.

Checks the environment first. If that's inconclusive, sends a query that every terminal answers
immediately (primary device attributes, DA1). Doesn't query through a multiplexer, from the
background, or if there is unread input. Imports nothing heavy, because `--help` runs through here.
"""

import fcntl
import os
import re
import select
import struct
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Pictures(StrEnum):
    """How images are drawn; AUTO is the best way that the terminal supports."""

    AUTO = "auto"
    KITTY = "kitty"
    ITERM2 = "iterm2"
    SIXEL = "sixel"
    BLOCKS = "blocks"


PATIENCE = 1.0
"""Seconds to wait for an answer. A later one would look like typing to the next reader."""

ASSUMED_CELL = 8, 16
"""Pixels of a character if unknown. Rather too small, so that images don't cover other text."""

CAN_KITTY = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\"
CELL_SIZE = b"\x1b[16t"
ATTRIBUTES = b"\x1b[c"
"""Sent last: every terminal answers it, so its answer marks the end of all answers."""

_ATTRIBUTES_ANSWER = re.compile(rb"\x1b\[\?([\d;]*)c")
_CELL_ANSWER = re.compile(rb"\x1b\[6;(\d+);(\d+)t")
_KITTY_ANSWER = b"\x1b_Gi=31;OK\x1b\\"
_SIXEL = b"4"
_LOCAL = 3
"""Index of the local modes in the result of `tcgetattr`."""


@dataclass(frozen=True, slots=True)
class Screen:
    """How to draw on a terminal (never AUTO), and the size of a character in pixels."""

    kind: Pictures
    cell: tuple[int, int]


def screen(console: "Console", choice: Pictures) -> Screen | None:
    """How to draw images on the console; None if it can't show any.

    Any choice but AUTO is used on any terminal, without checking.
    """
    if not console.is_interactive:
        return None
    kind, cell = Pictures.BLOCKS, ASSUMED_CELL
    descriptor = _descriptor(console)
    if descriptor is not None:
        known = by_environment(os.environ) if choice is Pictures.AUTO else choice
        answer = _ask(descriptor, _question(os.environ)) if known is None else b""
        kind = known or by_answer(answer)
        cell = _cell(descriptor, answer)
    if kind is Pictures.BLOCKS and (console.no_color or console.color_system is None):
        return None
    return Screen(kind, cell)


@contextmanager
def undisturbed(console: "Console") -> Iterator[None]:
    """Keep the terminal driver from discarding output on Ctrl-C and from echoing keys.

    Either could interrupt an escape sequence, and a truncated image swallows the output after it.
    """
    descriptor = _descriptor(console)
    if descriptor is None or _is_in_background(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    changed = [*before]
    changed[_LOCAL] = (changed[_LOCAL] | termios.NOFLSH) & ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def by_environment(variables: Mapping[str, str]) -> Pictures | None:
    """The way to draw, if the environment is conclusive; None to query the terminal."""
    term, program = variables.get("TERM", ""), variables.get("TERM_PROGRAM", "")
    is_within = any(name in variables for name in ("TMUX", "STY", "ZELLIJ"))
    if is_within or term.startswith(("screen", "tmux")):
        return Pictures.BLOCKS
    if program in ("iTerm.app", "WezTerm") and not may_be_kitty(variables):
        return Pictures.ITERM2
    return None


def _question(variables: Mapping[str, str]) -> bytes:
    return (CAN_KITTY if may_be_kitty(variables) else b"") + CELL_SIZE + ATTRIBUTES


def may_be_kitty(variables: Mapping[str, str]) -> bool:
    """Whether kitty's query may be sent; some other terminals print it."""
    names = variables.get("TERM", "") + " " + variables.get("TERM_PROGRAM", "")
    return "kitty" in names or "ghostty" in names or "KITTY_WINDOW_ID" in variables


def by_answer(answer: bytes) -> Pictures:
    """The way to draw, according to the terminal's answer."""
    if _KITTY_ANSWER in answer:
        return Pictures.KITTY
    attributes = _ATTRIBUTES_ANSWER.search(answer)
    can_sixel = attributes is not None and _SIXEL in attributes[1].split(b";")[1:]
    return Pictures.SIXEL if can_sixel else Pictures.BLOCKS


def _descriptor(console: "Console") -> int | None:
    """The console's file descriptor, if it's a real terminal and not just forced to act as one."""
    try:
        number = console.file.fileno()
    except (OSError, ValueError):
        return None
    return number if os.isatty(number) else None


def _ask(output: int, question: bytes) -> bytes:
    """All answers up to the one to ATTRIBUTES; empty if the terminal can't be queried."""
    if _is_in_background(output):
        return b""
    try:  # standard input may be a file of prompts
        terminal = os.open(os.ttyname(output), os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return b""
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal, termios.TCSANOW)
    try:
        return b"" if _has_input(terminal, 0) else _answer(terminal, question)
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
        os.close(terminal)


def _answer(terminal: int, question: bytes) -> bytes:
    os.write(terminal, question)
    answer, deadline = b"", time.monotonic() + PATIENCE
    while not _ATTRIBUTES_ANSWER.search(answer):
        if not _has_input(terminal, max(0.0, deadline - time.monotonic())):
            return b""
        answer += os.read(terminal, 4096)
    return answer


def _is_in_background(output: int) -> bool:
    """Whether the kernel would stop this process for touching its terminal."""
    try:
        return os.tcgetpgrp(output) != os.getpgrp()
    except OSError:  # without job control there is no background
        return False


def _has_input(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def _cell(descriptor: int, answer: bytes) -> tuple[int, int]:
    """Width and height of a character in pixels, from the terminal's driver or its answer."""
    try:
        size = fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8))
    except OSError:
        size = bytes(8)
    rows, columns, width, height = struct.unpack("HHHH", size)
    if 0 < columns <= width and 0 < rows <= height:
        return width // columns, height // rows
    size_answer = _CELL_ANSWER.search(answer)
    if size_answer and int(size_answer[1]) and int(size_answer[2]):
        return int(size_answer[2]), int(size_answer[1])
    return ASSUMED_CELL
