"""Reads the recipe back out of a picture made by imagemill.

`workers/recipe.py` writes it: in PNG as text chunks `imagemill` and `parameters`; in JPEG and WebP
as EXIF ImageDescription and UserComment, or in a JPEG's APP15 segments if it's very long. This
module doesn't import that one, because that would load torch. It returns the text as found; other
programs' files may contain anything, so callers have to validate it.
"""

import json
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

PNG_CHUNK, PNG_PARAMETERS = "imagemill", "parameters"
APP15, APP15_NAME = "APP15", b"imagemill\0"
_CHARSETS = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}
"""The eight bytes that name a UserComment's charset. We write UTF-16 in big-endian order."""


def description(picture: Image.Image) -> str | None:
    """The recipe's JSON in an open picture, or whatever text is in its place."""
    if picture.format == "PNG":
        text = picture.info.get(PNG_CHUNK)
    else:
        text = picture.getexif().get(ExifTags.Base.ImageDescription) or _segments(picture)
    return None if text is None else str(text)


def parameters(picture: Image.Image) -> str | None:
    """The settings in A1111's format, as written in an open picture."""
    text = picture.info.get(PNG_PARAMETERS)
    if text is None and picture.format != "PNG":
        text = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(text, bytes):
        charset = _CHARSETS.get(text[:8])
        return text[8:].decode(charset, "replace") if charset else None
    return None if text is None else str(text)


def recipe_of(path: Path) -> dict[str, Any] | None:
    """The recipe in a file, or None if it has none or isn't a picture. Decodes no pixels."""
    try:
        with Image.open(path) as picture:
            text = description(picture)
        recipe = json.loads(text) if text else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return recipe if isinstance(recipe, dict) else None


def _segments(picture: Image.Image) -> str | None:
    """The text in a JPEG's APP15 segments that imagemill wrote, joined."""
    segments: list[tuple[str, bytes]] = getattr(picture, "applist", [])
    ours = [data for name, data in segments if name == APP15 and data.startswith(APP15_NAME)]
    return b"".join(data.removeprefix(APP15_NAME) for data in ours).decode("utf-8") or None
