"""Reads the pages: their fenced blocks, commands and links."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCKER = sorted(path for path in (ROOT / "docker").rglob("*") if path.is_file())

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_VARIABLE = re.compile(r"IMAGEMILL_[A-Z_]*[A-Z]")
_PREFIXES = ("", ".venv/bin/")
_AFTER = {"&&", "||", "|", ";", "--"}


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return [body for named, body in _FENCE.findall(text) if named == language]


def without_blocks(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


def variables(text: str) -> set[str]:
    """The `IMAGEMILL_*` variables in a text."""
    return set(_VARIABLE.findall(text))


def commands(text: str, program: str) -> Iterator[list[str]]:
    """The arguments of every call of a program, in shell blocks and in `code`."""
    lines = [line for body in blocks(text, "sh") for line in _lines(body)]
    lines += re.findall(r"`([^`\n]+)`", without_blocks(text))
    for line in lines:
        words = _words(line)
        for place, word in enumerate(words):
            begins = place == 0 or words[place - 1] in _AFTER
            if begins and word in [prefix + program for prefix in _PREFIXES]:
                rest = words[place + 1 :]
                ends = [index for index, word in enumerate(rest) if word in _AFTER]
                yield rest[: ends[0]] if ends else rest


def _lines(body: str) -> list[str]:
    return body.replace("\\\n", " ").splitlines()


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an open quote: a string over several lines, or an apostrophe
        return line.split()


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Relative links of a page: path and anchor, either of which may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}
