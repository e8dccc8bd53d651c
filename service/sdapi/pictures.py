"""Pictures and what they say of themselves, in A1111's form. Knows no store and no HTTP."""

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
"""Characters of a line of settings that are read; a stranger's picture may hold megabytes."""


def from_base64(text: str) -> bytes:
    """The bytes of base64, with or without a data URL's head. Raises InvalidRequest."""
    head, comma, rest = text.partition(",")
    try:
        return base64.b64decode(rest if comma and head.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad("must be base64") from error


def texts(data: bytes) -> dict[str, str]:
    """A picture's texts: a PNG's chunks, and `parameters` wherever they are.

    Raises InvalidRequest for what is no picture.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            found = {
                str(name): value for name, value in picture.info.items() if isinstance(value, str)
            }
            said = parameters(picture)
            return found if said is None else {**found, "parameters": said}
    except (UnidentifiedImageError, EOFError, OSError, ValueError, SyntaxError) as error:
        raise _bad("must be a picture") from error
    except Image.DecompressionBombError as error:
        raise _bad("must not be that large") from error


def settings(text: str) -> dict[str, Any]:
    """The settings in a `parameters` text: prompt, negative prompt, and the last line's pairs."""
    lines = text.strip().split("\n")
    last = lines.pop() if lines[-1].startswith("Steps: ") else ""
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    found = _SETTING.findall(last[:_LONGEST_SETTINGS])
    pairs = {name.strip(): value.strip() for name, value in found}
    return {"Prompt": prompt, "Negative prompt": negative, **pairs}


def _bad(detail: str) -> InvalidRequest:
    return InvalidRequest(f"image {detail}", (FieldProblem("/image", detail),))
