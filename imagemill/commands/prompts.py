"""Reads prompts from text, JSON, JSONL and CSV files or standard input.

Checks the names and types of a prompt's fields. The server checks their ranges; `Prompt.source`
lets its errors be reported by file and line.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagemill.client.errors import InvalidInput
from jobs.fields import FIELDS, PER_PROMPT

SHOWN_PROBLEMS = 20


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


def read_prompts(path: str) -> list[Prompt]:
    """All prompts of a file, by its suffix (.jsonl, .json, .csv, else text); `-` is standard input.

    Standard input is JSONL if its first character is `{`, JSON if it's `[`, CSV if its first line
    names a column `prompt`, otherwise text. Raises InvalidInput with one line per bad line.
    """
    name, text = ("stdin", _stdin()) if path == "-" else (path, _file(path))
    suffix = _suffix_of(text) if path == "-" else Path(path).suffix.lower()
    problems: list[str] = []
    parsers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv}
    parse = parsers.get(suffix, _text)
    prompts = list(parse(name, text, problems.append))
    if len(problems) > SHOWN_PROBLEMS:
        more = len(problems) - SHOWN_PROBLEMS
        problems[SHOWN_PROBLEMS:] = [f"{name}: {more} more invalid lines"]
    if problems:
        raise InvalidInput(*problems)
    if not prompts:
        raise InvalidInput(f"{name}: contains no prompts")
    return prompts


def _suffix_of(text: str) -> str:
    """The suffix that a file with this text would have."""
    begin = text.lstrip()
    if begin[:1] in ("{", "["):
        return ".jsonl" if begin[0] == "{" else ".json"
    try:
        first = next(csv.reader([begin.partition("\n")[0]]), [])
    except csv.Error:
        return ""
    return ".csv" if "prompt" in [cell.strip() for cell in first] else ""


def _stdin() -> str:
    return _decode("stdin", sys.stdin.buffer.read())


def _file(path: str) -> str:
    try:
        return _decode(path, Path(path).read_bytes())
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}") from error


def _decode(name: str, data: bytes) -> str:
    """Decode UTF-8 with or without a byte order mark; an error names the line of the bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(f"{name} line {line}: invalid UTF-8") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, stripped. Only a newline ends a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _text(name: str, text: str, complain: Callable[[str], None]) -> Iterator[Prompt]:
    for number, line in _lines(text):
        yield Prompt(line, source=f"{name} line {number}")


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
    """Check a JSON value's type. A float field accepts integers; no field accepts booleans."""
    kind = _kind_of(key)
    allowed = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise _Bad(f"`{key}` must be {_NAMES[kind]}, not {json.dumps(value)}")
    return value


def _csv(name: str, text: str, complain: Callable[[str], None]) -> Iterator[Prompt]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
            if row is None:
                return
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = _header(row)
                continue
            yield _from_row(header, row, f"{name} line {first}")
        except csv.Error as error:
            complain(f"{name} line {first}: invalid CSV: {error}")
            return
        except _Bad as problem:
            complain(f"{name} line {first}: {problem}")
            if header is None:
                return


def _header(row: list[str]) -> list[str]:
    """The column names. `prompt` is required; unknown and duplicate columns are errors."""
    names = [cell.strip() for cell in row]
    if "prompt" not in names:
        raise _Bad(f"the first line must name the columns, including `prompt`; got {row}")
    for column in names:
        if column != "prompt":
            _kind_of(column)
        if names.count(column) > 1:
            raise _Bad(f"duplicate column `{column}`")
    return names


def _from_row(header: list[str], row: list[str], source: str) -> Prompt:
    """Parse a row; an empty cell means unset."""
    if len(row) > len(header):
        raise _Bad(f"{len(row)} cells for {len(header)} columns (quote cells that contain commas)")
    cells = {key: cell.strip() for key, cell in zip(header, row, strict=False) if cell.strip()}
    text = cells.pop("prompt", None)
    if text is None:
        raise _Bad("`prompt` is empty")
    return Prompt(text, {key: _parsed(key, cell) for key, cell in cells.items()}, source)


def _parsed(key: str, cell: str) -> Any:
    kind = _kind_of(key)
    try:
        return kind(cell)
    except ValueError as error:
        raise _Bad(f"`{key}` must be {_NAMES[kind]}, not {cell!r}") from error


_NAMES: dict[type, str] = {str: "a string", int: "an integer", float: "a number"}


def _kind_of(key: str) -> type:
    if key not in PER_PROMPT:
        raise _Bad(f"unknown field `{key}`; expected prompt, {', '.join(PER_PROMPT)}")
    return FIELDS[key].kind
