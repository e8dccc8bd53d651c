"""The recipe inside a picture of ours, read back out of the file's head.

Knows where `workers/recipe.py` puts it (PNG: text chunks `imagemill` and `parameters`; JPEG and
WebP: EXIF ImageDescription and UserComment, a very long one in a JPEG's APP15 segments) but imports
nothing of it, since that would load torch. What it reads is text as it stands there: whether a
stranger's file says anything sensible is for the caller to judge.
"""

import json
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

PNG_CHUNK, PNG_PARAMETERS = "imagemill", "parameters"
APP15, APP15_NAME = "APP15", b"imagemill\0"
_CHARSETS = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}
"""How a UserComment names its charset, in eight bytes; ours takes UTF-16's big end first."""


def description(picture: Image.Image) -> str | None:
    """The recipe's JSON as written in an open picture, or whatever else stands in its place."""
    if picture.format == "PNG":
        text = picture.info.get(PNG_CHUNK)
    else:
        text = picture.getexif().get(ExifTags.Base.ImageDescription) or _segments(picture)
    return None if text is None else str(text)


def parameters(picture: Image.Image) -> str | None:
    """The settings in A1111's form, as written in an open picture."""
    text = picture.info.get(PNG_PARAMETERS)
    if text is None and picture.format != "PNG":
        text = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(text, bytes):
        charset = _CHARSETS.get(text[:8])
        return text[8:].decode(charset, "replace") if charset else None
    return None if text is None else str(text)


def recipe_of(path: Path) -> dict[str, Any] | None:
    """The recipe in a file; None for one without, and for what is no picture. Reads no pixels."""
    try:
        with Image.open(path) as picture:
            text = description(picture)
        found = json.loads(text) if text else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return found if isinstance(found, dict) else None


def _segments(picture: Image.Image) -> str | None:
    """What a JPEG's segments of ours say, all together."""
    listed: list[tuple[str, bytes]] = getattr(picture, "applist", [])
    ours = [data for name, data in listed if name == APP15 and data.startswith(APP15_NAME)]
    return b"".join(data.removeprefix(APP15_NAME) for data in ours).decode("utf-8") or None
