"""Prompts out of files: text, JSON, JSONL, CSV or standard input, each with the place it came from.

Knows the fields that a prompt may carry and their types; their ranges are the server's to judge,
and `Prompt.source` lets the judgement be shown against the file and line.
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
    """One prompt, the fields given with it, and where it came from: `file line 3`."""

    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    def body(self) -> str | dict[str, Any]:
        """The prompt as it stands in a job's `prompts`."""
        return {"prompt": self.text, **self.fields} if self.fields else self.text


class _Bad(Exception):
    """One line's problem, on its way to the list of all of them."""


def read_prompts(path: str) -> list[Prompt]:
    """All prompts of a file, by its suffix (.jsonl, .json, .csv, else text); `-` is standard input.

    Standard input is JSONL when its first character is `{`, JSON when it is `[`, CSV when its first
    line names a column `prompt`, text otherwise.
    Raises InvalidInput with a line for every bad line.
    """
    name, text = ("stdin", _stdin()) if path == "-" else (path, _file(path))
    suffix = _suffix_of(text) if path == "-" else Path(path).suffix.lower()
    problems: list[str] = []
    parsers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv}
    parse = parsers.get(suffix, _text)
    prompts = list(parse(name, text, problems.append))
    if len(problems) > SHOWN_PROBLEMS:
        more = len(problems) - SHOWN_PROBLEMS
        problems[SHOWN_PROBLEMS:] = [f"{name}: {more} more lines with problems"]
    if problems:
        raise InvalidInput(*problems)
    if not prompts:
        raise InvalidInput(f"{name}: no prompts in it")
    return prompts


def _suffix_of(text: str) -> str:
    """What the name of a file of this text would end in."""
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
    """UTF-8, with or without a byte order mark; names the line of the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(f"{name} line {line}: not UTF-8 text") from error


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
    """A list of what a line of JSONL may hold, alone or as an object's `prompts`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return complain(f"{name} line {error.lineno}: not JSON: {error.msg}")
    listed = value.get("prompts") if isinstance(value, dict) else value
    if not isinstance(listed, list):
        return complain(f"{name}: must be a list of prompts, or an object with such `prompts`")
    for number, one in enumerate(listed, 1):
        source = f"{name} prompt {number}"
        try:
            yield _from_value(one, source)
        except _Bad as problem:
            complain(f"{source}: {problem}")
    return None


def _from_json(line: str, source: str) -> Prompt:
    """One line of JSONL."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Bad(f"not JSON: {error.msg} at column {error.colno}") from error
    return _from_value(value, source)


def _from_value(value: Any, source: str) -> Prompt:
    """A JSON string, or an object with `prompt` and any of PER_PROMPT; null means not given."""
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise _Bad("must be a string or an object with a `prompt`")
    text = value.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise _Bad("`prompt` must be a text that is not blank")
    fields = {key: _typed(key, given) for key, given in value.items() if given is not None}
    return Prompt(text.strip(), fields, source)


def _typed(key: str, value: Any) -> Any:
    """A JSON value of the field's type; an integer will do for a float, true for neither."""
    wanted = _wanted(key)
    allowed = (int, float) if wanted is float else wanted
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise _Bad(f"`{key}` must be {_NAMES[wanted]}, not {json.dumps(value)}")
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
            complain(f"{name} line {first}: not CSV: {error}")
            return
        except _Bad as problem:
            complain(f"{name} line {first}: {problem}")
            if header is None:
                return


def _header(row: list[str]) -> list[str]:
    """Column names; `prompt` must be one, and none may be unknown or come twice."""
    names = [cell.strip() for cell in row]
    if "prompt" not in names:
        raise _Bad(f"the first line must name the columns, `prompt` among them; it is {row}")
    for column in names:
        if column != "prompt":
            _wanted(column)
        if names.count(column) > 1:
            raise _Bad(f"column `{column}` is there twice")
    return names


def _from_row(header: list[str], row: list[str], source: str) -> Prompt:
    """A row under its header; an empty cell means not given."""
    if len(row) > len(header):
        raise _Bad(f"{len(row)} cells under {len(header)} columns (put quotes around commas)")
    cells = {key: cell.strip() for key, cell in zip(header, row, strict=False) if cell.strip()}
    text = cells.pop("prompt", None)
    if text is None:
        raise _Bad("`prompt` is empty")
    return Prompt(text, {key: _parsed(key, cell) for key, cell in cells.items()}, source)


def _parsed(key: str, cell: str) -> Any:
    wanted = _wanted(key)
    try:
        return wanted(cell)
    except ValueError as error:
        raise _Bad(f"`{key}` must be {_NAMES[wanted]}, not {cell!r}") from error


_NAMES: dict[type, str] = {str: "a text", int: "a whole number", float: "a number"}


def _wanted(key: str) -> type:
    if key not in PER_PROMPT:
        raise _Bad(f"unknown field `{key}`; known: prompt, {', '.join(PER_PROMPT)}")
    return FIELDS[key].kind
