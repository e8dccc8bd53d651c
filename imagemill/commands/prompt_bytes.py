"""Reads a prompt file or standard input as text, whatever program wrote it.

UTF-8 is read with or without a byte order mark, UTF-16 and UTF-32 with one. Anything else is
refused with its likely cause, because a wrong guess would silently draw other prompts.
"""

import codecs
import sys
from pathlib import Path

from imagemill.client.errors import InvalidInput

LARGEST_FILE = 32 * 2**20
"""Bytes above which a file is refused before it's read; a server takes 16 MiB unless set higher."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),  # begins like the mark of UTF-16, so it comes first
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)

_FORMATS = {
    b"PK\x03\x04": "a ZIP archive or a spreadsheet (.xlsx, .ods); export it as CSV",
    b"\x1f\x8b": "compressed with gzip; decompress it",
    b"%PDF": "a PDF; copy its text to a text file",
    b"\x89PNG": "a picture; `imagemill inspect` shows the prompt in it",
    b"\xff\xd8\xff": "a picture; `imagemill inspect` shows the prompt in it",
}


def read_text(path: str) -> tuple[str, str]:
    """The name for messages and the text of a file; `-` is standard input. Raises InvalidInput."""
    name = "stdin" if path == "-" else path
    try:
        if path == "-":
            data = sys.stdin.buffer.read(LARGEST_FILE + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InvalidInput(f"{name}: {error.strerror or error}") from error
    if len(data) > LARGEST_FILE:
        raise InvalidInput(
            f"{name}: larger than {LARGEST_FILE // 2**20} MiB, which is more than one job takes; "
            "split it, for example with `split -l 10000`"
        )
    return name, decode(name, data)


def decode(name: str, data: bytes) -> str:
    """The text of a file's bytes; `name` is for errors. Raises InvalidInput."""
    for begin, what in _FORMATS.items():
        if data.startswith(begin):
            raise InvalidInput(f"{name}: not text but {what}")
    mark = next((entry for entry in _MARKS if data.startswith(entry[0])), (b"", "utf-8", "UTF-8"))
    _, codec, title = mark
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        cause = _cause(data, error.start) if title == "UTF-8" else ""
        raise InvalidInput(f"{name} line {line}: invalid {title}{cause}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InvalidInput(
            f"{name} line {line}: contains NUL characters; it's either binary, or UTF-16 without "
            "a byte order mark: save it as UTF-8"
        )
    return text


def _cause(data: bytes, place: int) -> str:
    """What the file probably is instead of UTF-8, as the end of a sentence."""
    if b"\0" in data:
        return "; the file is probably binary"
    try:
        seen = data[place : place + 1].decode("cp1252")
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "; save the file as UTF-8"
    return (
        f"; the file is probably in Windows-1252, where this byte is {seen!r}. Save it as UTF-8, "
        "for example with `iconv -f WINDOWS-1252 -t UTF-8`"
    )
