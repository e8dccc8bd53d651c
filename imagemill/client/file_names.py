"""Names of downloaded images, and whether an image was already downloaded.

A name depends only on the image's index and prompt, so a resumed download finds the earlier files
without keeping a record.
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from imagemill.client.errors import CannotSave

SLUG_CHARACTERS = 48
SLUG_BYTES = 150


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, joined by hyphens.

    At most SLUG_CHARACTERS long, cut between words if possible.
    """
    text = unicodedata.normalize("NFKC", prompt[:400]).lower()
    words = "-".join(re.findall(r"[^\W_]+", text))
    if len(words) > SLUG_CHARACTERS:
        cut = words[: SLUG_CHARACTERS + 1]
        words = cut.rpartition("-")[0] if "-" in cut else cut[:-1]
    while len(words.encode()) > SLUG_BYTES:
        words = words[:-1]
    return words.strip("-") or "image"


def file_name(index: int, prompt: str, suffix: str, total: int = 0) -> str:
    """Such as `0007-a-red-circle.png`; the number has the width of the last of `total`, min. 4."""
    width = max(4, len(str(max(total - 1, 0))))
    words = slug(prompt)
    try:
        os.fsencode(words)
    except UnicodeEncodeError:  # in a locale whose file names can't have these letters
        words = slug(words.encode("ascii", "ignore").decode())
    return f"{index:0{width}d}-{words}{suffix}"


def sha256_of(path: Path) -> str:
    """A file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def candidates(path: Path) -> Iterator[Path]:
    """The name itself, then `name-2`, `name-3`, ..."""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1


def place_for(path: Path, sha256: str) -> tuple[Path, bool]:
    """Where the image with that checksum belongs, and whether it's already there.

    A file with different bytes is never overwritten, because it's another job's image; the next
    free name is used instead.
    """
    for candidate in candidates(path):
        if not candidate.exists():
            return candidate, False
        if sha256_of(candidate) == sha256:
            return candidate, True
    raise AssertionError("names never run out")


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically, through a temporary file and a rename.

    Raises CannotSave on failure and leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name[:80]}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CannotSave(f"couldn't write {path}: {error.strerror or error}") from error
