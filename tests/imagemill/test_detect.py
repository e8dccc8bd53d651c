"""Detecting how a terminal can show images, from its environment and its answers."""

import io
import os
import termios
from pathlib import Path

import pytest
from rich.console import Console

from imagemill.terminal.detect import (
    Pictures,
    by_answer,
    by_environment,
    may_be_kitty,
    screen,
    undisturbed,
)

ITERM2, BLOCKS = Pictures.ITERM2, Pictures.BLOCKS


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, None),
        ({"TERM": "foot"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, ITERM2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, ITERM2),
        ({"TERM": "xterm-kitty", "TERM_PROGRAM": "WezTerm"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/t,1,0"}, BLOCKS),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "tmux"}, BLOCKS),
        ({"TERM": "screen.xterm-256color"}, BLOCKS),
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1", "STY": "1.pts"}, BLOCKS),
        ({"TERM": "xterm-256color", "ZELLIJ": "0"}, BLOCKS),
    ],
)
def test_by_environment(variables: dict[str, str], expected: Pictures | None) -> None:
    assert by_environment(variables) is expected


def test_only_kitty_like_terminals_get_the_kitty_query() -> None:
    assert may_be_kitty({"TERM": "xterm-kitty"})
    assert may_be_kitty({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"})
    assert may_be_kitty({"TERM": "xterm-ghostty"})
    assert not may_be_kitty({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", BLOCKS),
        (b"\x1b[?62;22c", BLOCKS),
        (b"\x1b[?62;4;22c", Pictures.SIXEL),
        (b"\x1b[6;20;10t\x1b[?65;1;4c", Pictures.SIXEL),
        (b"\x1b[?4c", BLOCKS),  # the first number is the terminal's class
        (b"\x1b[?62;14;44c", BLOCKS),
        (b"\x1b_Gi=31;OK\x1b\\\x1b[?62;4c", Pictures.KITTY),
        (b"\x1b_Gi=31;ENOTSUPPORTED\x1b\\\x1b[?62c", BLOCKS),
    ],
)
def test_by_answer(answer: bytes, expected: Pictures) -> None:
    assert by_answer(answer) is expected


@pytest.mark.parametrize("choice", list(Pictures))
def test_files_and_pipes_get_no_protocol(
    choice: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if they're forced to act as a terminal."""
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert screen(Console(file=io.StringIO()), choice) is None
    with (tmp_path / "log").open("w") as log:
        for file in (io.StringIO(), log):
            forced = screen(Console(file=file, force_terminal=True), choice)
            assert forced is not None and forced.kind is BLOCKS


def test_half_blocks_need_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    plain = Console(file=io.StringIO(), force_terminal=True, no_color=True)
    assert screen(plain, Pictures.AUTO) is None


def test_undisturbed_changes_the_terminal_modes_and_restores_them() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        before = termios.tcgetattr(theirs)
        with undisturbed(Console(file=terminal)):
            local = termios.tcgetattr(theirs)[3]
            assert local & termios.NOFLSH and not local & termios.ECHO and local & termios.ISIG
        assert termios.tcgetattr(theirs) == before
    os.close(ours)
