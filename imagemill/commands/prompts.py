"""Reads prompts from text, JSON, JSONL, CSV and TSV files or standard input.

Checks the names and types of a prompt's fields. The server checks their ranges; `Prompt.source`
lets its errors be reported by file and line.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

from imagemill.client.errors import InvalidInput
from imagemill.commands.prompt_bytes import read_text
from jobs.fields import FIELDS, PER_PROMPT

SHOWN_PROBLEMS = 20

MOST_PROMPTS = 200_000
"""More are refused before anything is sent. A tenant may have half as many queued by default."""

SEPARATORS = (",", ";", "\t")
"""What separates the cells of a table; its header line tells which."""

SEPARATOR_HINTS = tuple(f"sep={separator}" for separator in SEPARATORS)
"""Excel's first line of a table, which isn't the header."""

LONGEST_INTEGER = 30
"""Digits. A longer one is out of every field's range, and slow to convert."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, the fields given with it, and where it came from, such as `file line 3`."""

    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    def body(self) -> str | dict[str, Any]:
        """The prompt as an item of a job's `prompts`."""
        return {"prompt": self.text, **self.fields} if self.fields else self.text


class _Bad(Exception):
    """A problem with one line; all of them are collected before anything is raised."""


class _Problems:
    """The first problems of a file, and how many there are."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._count = 0

    def add(self, problem: str) -> None:
        """Note a problem, a sentence that begins with its place."""
        self._count += 1
        if self._count <= SHOWN_PROBLEMS:
            self._shown.append(problem)

    def check(self, name: str) -> None:
        """Raise InvalidInput if there are any."""
        if self._count > SHOWN_PROBLEMS:
            self._shown.append(f"{name}: {self._count - SHOWN_PROBLEMS} more invalid lines")
        if self._shown:
            raise InvalidInput(*self._shown)


def read_prompts(path: str) -> list[Prompt]:
    """All prompts of a file, by its suffix; `-` is standard input.

    The suffixes are .jsonl or .ndjson, .json, .csv and .tsv; anything else is text. Standard input
    is JSONL if its first character is `{`, JSON if it's `[`, CSV or TSV if its first line names a
    column `prompt`, otherwise text. Raises InvalidInput with one line per bad line.
    """
    name, text = read_text(path)
    suffix = _suffix_of(text) if path == "-" else Path(path).suffix.lower()
    problems = _Problems()
    parsers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}
    parse = parsers.get(suffix, _text)
    prompts = list(islice(parse(name, text, problems.add), MOST_PROMPTS + 1))
    problems.check(name)
    if len(prompts) > MOST_PROMPTS:
        raise InvalidInput(
            f"{name}: more than {MOST_PROMPTS} prompts, which is more than one job takes; "
            "split it, for example with `split -l 10000`"
        )
    if not prompts:
        raise InvalidInput(f"{name}: contains no prompts")
    return prompts


def _suffix_of(text: str) -> str:
    """The suffix that a file with this text would have."""
    begin = next((line for _, line in _lines(text)), "")
    if begin[:1] in ("{", "["):
        return ".jsonl" if begin[0] == "{" else ".json"
    return ".csv" if _separator(begin) else ""


def _separator(line: str) -> str | None:
    """What separates the cells of a header line; None if the line names no column `prompt`."""
    for separator in SEPARATORS:
        try:
            cells = next(csv.reader([line], delimiter=separator), [])
        except csv.Error:
            continue
        if "prompt" in map(_column, cells):
            return separator
    return None


def _column(cell: str) -> str:
    """A header cell as a field's name, so that `Negative Prompt` is `negative_prompt`."""
    return re.sub(r"[\s-]+", "_", cell.strip().lower())


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are neither blank nor comments, stripped. Only a newline ends a line."""
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield number, stripped


def _text(name: str, text: str, complain: Callable[[str], None]) -> Iterator[Prompt]:
    for number, line in _lines(text):
        # A backslash keeps a # at the beginning from starting a comment.
        begin = line.removeprefix("\\") if line.startswith("\\#") else line
        yield Prompt(begin, source=f"{name} line {number}")


def _jsonl(name: str, text: str, complain: Callable[[str], None]) -> Iterator[Prompt]:
    for number, line in _lines(text):
        source = f"{name} line {number}"
        try:
            yield _from_json(line, source)
        except _Bad as problem:
            complain(f"{source}: {problem}")


def _json(name: str, text: str, complain: Callable[[str], None]) -> Iterator[Prompt]:
    """A list of JSONL values, either at the top level or as an object's `prompts`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return complain(f"{name} line {error.lineno}: invalid JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number too long, or too many brackets
        return complain(f"{name}: invalid JSON: {error}")
    items = value.get("prompts") if isinstance(value, dict) else value
    if not isinstance(items, list):
        return complain(f"{name}: must be a list of prompts, or an object with a list `prompts`")
    for number, item in enumerate(items, 1):
        source = f"{name} prompt {number}"
        try:
            yield _from_value(item, source)
        except _Bad as problem:
            complain(f"{source}: {problem}")
    return None


def _from_json(line: str, source: str) -> Prompt:
    """Parse one line of JSONL."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Bad(f"invalid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number too long, or too many brackets
        raise _Bad(f"invalid JSON: {error}") from error
    return _from_value(value, source)


def _from_value(value: Any, source: str) -> Prompt:
    """Parse a string, or an object with `prompt` and any fields of PER_PROMPT; null means unset."""
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise _Bad("must be a string or an object with a `prompt`")
    text = value.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise _Bad("`prompt` must be a non-blank string")
    fields = {key: _typed(key, item) for key, item in value.items() if item is not None}
    return Prompt(text.strip(), fields, source)


def _typed(key: str, value: Any) -> Any:
    """Check a JSON value's type. A float field accepts integers, and an integer field `8.0`.

    No field accepts booleans.
    """
    kind = _kind_of(key)
    allowed = (int, float) if kind is float else kind
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise _Bad(f"`{key}` must be {_NAMES[kind]}, not {json.dumps(value)}")
    return value


def _csv(name: str, text: str, complain: Callable[[str], None]) -> Iterator[Prompt]:
    """A table. Excel's line `sep=;` may come before the header."""
    begin = [_separator(line) for _, line in islice(_lines(text), 2)]
    separator = next(filter(None, begin), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
            if row is None:
                return
            if not any(cell.strip() for cell in row) or row[0].lstrip().startswith("#"):
                continue
            if header is None:
                is_hint = separator.join(row).strip().lower() in SEPARATOR_HINTS
                header = None if is_hint else _header(row)
                continue
            yield _from_row(header, row, f"{name} line {first}", separator)
        except csv.Error as error:
            complain(f"{name} line {first}: invalid CSV: {error}")
            return
        except _Bad as problem:
            complain(f"{name} line {first}: {problem}")
            if header is None:
                return


def _header(row: list[str]) -> list[str]:
    """The column names. `prompt` is required; unknown and duplicate columns are errors."""
    names = [_column(cell) for cell in row]
    if "prompt" not in names:
        raise _Bad(f"the first line must name the columns, including `prompt`; got {row}")
    for column in names:
        if column != "prompt":
            _kind_of(column)
        if names.count(column) > 1:
            raise _Bad(f"duplicate column `{column}`")
    return names


def _from_row(header: list[str], row: list[str], source: str, separator: str) -> Prompt:
    """Parse a row; an empty cell means unset, and `\\#` begins a cell that would be a comment."""
    if len(row) > len(header):
        what = {",": "commas", ";": "semicolons", "\t": "tabs"}[separator]
        raise _Bad(f"{len(row)} cells for {len(header)} columns (quote cells that contain {what})")
    cells = {key: cell.strip() for key, cell in zip(header, row, strict=False) if cell.strip()}
    text = cells.pop("prompt", None)
    if text is None:
        raise _Bad("`prompt` is empty")
    begin = text.removeprefix("\\") if text.startswith("\\#") else text
    # Where the semicolon separates cells, the comma is the decimal point.
    point = "," if separator == ";" else "."
    return Prompt(begin, {key: _parsed(key, cell, point) for key, cell in cells.items()}, source)


def _parsed(key: str, cell: str, point: str) -> Any:
    kind = _kind_of(key)
    try:
        if kind is float:
            return float(cell.replace(point, "."))
        return _integer(cell.replace(point, ".")) if kind is int else kind(cell)
    except (ValueError, InvalidOperation) as error:
        raise _Bad(f"`{key}` must be {_NAMES[kind]}, not {cell!r}") from error


def _integer(cell: str) -> int:
    """An integer, also written as spreadsheets do: `8.0` or `1.5E+3`. Raises ValueError."""
    number = Decimal(cell)
    if not number.is_finite() or number.adjusted() > LONGEST_INTEGER or number % 1:
        raise ValueError(cell)
    return int(number)


_NAMES: dict[type, str] = {str: "a string", int: "an integer", float: "a number"}


def _kind_of(key: str) -> type:
    if key not in PER_PROMPT:
        raise _Bad(f"unknown field `{key}`; expected prompt, {', '.join(PER_PROMPT)}")
    return FIELDS[key].kind
