"""Reads images and their embedded parameters in A1111's format. No store and no HTTP here."""

import base64
import binascii
import io
import re
from typing import Any

from PIL import Image, UnidentifiedImageError

from jobs.errors import FieldProblem, InvalidRequest
from jobs.recipe import parameters

_SETTING = re.compile(r'(\w[\w ]{0,60}):\s?("(?:\\.|[^"\\])*"|[^,]*)(?:,\s?|$)')
_LONGEST_SETTINGS = 4000
"""Characters of a settings line that are parsed, because an uploaded file may contain megabytes."""


def from_base64(text: str) -> bytes:
    """Decode base64, with or without line breaks and the head of a data URL.

    Raises InvalidRequest.
    """
    head, comma, rest = text.strip().partition(",")
    body = rest if comma and head.startswith("data:") else text
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad("must be base64") from error


def texts(data: bytes) -> dict[str, str]:
    """An image's texts: the chunks of a PNG, and `parameters` in any format.

    Raises InvalidRequest if it isn't an image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            chunks = {
                str(name): value for name, value in picture.info.items() if isinstance(value, str)
            }
            text = parameters(picture)
            return chunks if text is None else {**chunks, "parameters": text}
    except (UnidentifiedImageError, EOFError, OSError, ValueError, SyntaxError) as error:
        raise _bad("must be a PNG, JPEG or WebP image") from error
    except Image.DecompressionBombError as error:
        raise _bad("is too large") from error


def settings(text: str) -> dict[str, Any]:
    """Parse a `parameters` text: prompt, negative prompt, and the pairs of its last line."""
    lines = text.strip().split("\n")
    last = lines.pop() if lines[-1].startswith("Steps: ") else ""
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    matches = _SETTING.findall(last[:_LONGEST_SETTINGS])
    pairs = {name.strip(): value.strip() for name, value in matches}
    return {"Prompt": prompt, "Negative prompt": negative, **pairs}


def _bad(detail: str) -> InvalidRequest:
    return InvalidRequest(f"image {detail}", (FieldProblem("/image", detail),))
