"""Expands `{red|blue} star` and `__wildcard__` in prompts, as `--expand` asks for.

Every combination becomes a prompt, in a fixed order: the last choice changes fastest. Choices may
be nested, and the lines of a wildcard's file may contain choices and wildcards themselves.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

from imagemill.client.errors import InvalidInput
from imagemill.commands.prompt_bytes import read_text
from imagemill.commands.prompts import MOST_PROMPTS, Prompt

DEEPEST = 20
"""How deep choices may be nested."""

LARGEST_TEXT = 64 * 2**20
"""Characters of all combinations of one prompt; more would take gigabytes of memory."""

_TOKEN = re.compile(r"\\[{|}_]|[{|}]|__[A-Za-z0-9][A-Za-z0-9/-]*(?:_[A-Za-z0-9/-]+)*__")


class _Wrong(Exception):
    """What is wrong with one prompt."""


def expand(prompts: Sequence[Prompt], folder: Path) -> list[Prompt]:
    """The prompts with every combination of their choices; each keeps its fields and source.

    `folder` has the wildcards' files: `__colour__` stands for the lines of `colour.txt`. Raises
    InvalidInput for an open brace, a missing file, or more than MOST_PROMPTS prompts in total.
    """
    wildcards = _Wildcards(folder)
    expanded: list[Prompt] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            texts = _Parser(prompt.text, wildcards).texts()
        except _Wrong as error:
            raise InvalidInput(f"{prompt.source or f'prompt {number}'}: {error}") from None
        if len(expanded) + len(texts) > MOST_PROMPTS:
            raise InvalidInput(f"--expand makes more than {MOST_PROMPTS} prompts")
        if texts != [prompt.text]:  # an empty choice leaves two spaces
            texts = list(dict.fromkeys(" ".join(text.split()) for text in texts))
        expanded += [replace(prompt, text=text) for text in texts if text]
    return expanded


class _Wildcards:
    """The lines of the wildcards' files, read once each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._texts: dict[str, list[str]] = {}
        self._open: list[str] = []

    def texts(self, name: str) -> list[str]:
        """The expanded lines of a wildcard. Raises _Wrong."""
        if name in self._texts:
            return self._texts[name]
        if name in self._open:
            raise _Wrong(f"__{name}__ contains itself: {' > '.join([*self._open, name])}")
        path = self._folder / f"{name}.txt"
        if not path.is_file():
            raise _Wrong(f"no file {path} for __{name}__; --wildcards names the folder")
        _, text = read_text(str(path))
        self._open.append(name)
        lines = [line.strip() for line in text.split("\n")]
        found: list[str] = []
        for line in lines:
            if line and not line.startswith("#"):
                found += _Parser(line, self).texts()
                _refuse_too_many(len(found))
        self._open.pop()
        if not found:
            raise _Wrong(f"{path} is empty")
        self._texts[name] = found
        return found


class _Parser:
    """Parses one text by recursive descent."""

    def __init__(self, text: str, wildcards: _Wildcards) -> None:
        self._tokens = list(_tokens(text))
        self._place = 0
        self._depth = 0
        self._wildcards = wildcards

    def texts(self) -> list[str]:
        """All combinations. Raises _Wrong."""
        return self._sequence(is_inside=False)

    def _sequence(self, *, is_inside: bool) -> list[str]:
        parts: list[list[str]] = []
        while self._place < len(self._tokens):
            token = self._tokens[self._place]
            if is_inside and token in ("|", "}"):
                break
            self._place += 1
            if token == "{":
                parts.append(self._choice())
            elif token.startswith("__") and token.endswith("__") and _TOKEN.fullmatch(token):
                parts.append(self._wildcards.texts(token[2:-2]))
            elif token.startswith("\\") and _TOKEN.fullmatch(token):
                parts.append([token[1:]])
            else:
                parts.append([token])
        count = prod(len(part) for part in parts)
        _refuse_too_many(count, sum(max(map(len, part), default=0) for part in parts))
        return ["".join(choice) for choice in product(*parts)]

    def _choice(self) -> list[str]:
        options: list[str] = []
        self._depth += 1
        if self._depth > DEEPEST:
            raise _Wrong(f"choices are nested more than {DEEPEST} deep")
        while True:
            options += self._sequence(is_inside=True)
            if self._place >= len(self._tokens):
                raise _Wrong("a { is never closed; write \\{ for a brace in the prompt")
            self._place += 1
            if self._tokens[self._place - 1] == "}":
                self._depth -= 1
                return options


def _tokens(text: str) -> Iterator[str]:
    end = 0
    for found in _TOKEN.finditer(text):
        if found.start() > end:
            yield text[end : found.start()]
        yield found[0]
        end = found.end()
    if end < len(text):
        yield text[end:]


def _refuse_too_many(count: int, length: int = 0) -> None:
    if count > MOST_PROMPTS:
        raise _Wrong(f"{count} combinations, more than {MOST_PROMPTS}")
    if count * length > LARGEST_TEXT:
        raise _Wrong(f"{count} combinations of up to {length} characters are too much text")
