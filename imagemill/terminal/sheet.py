"""The contact sheet: a grid of thumbnails of a job's images, each with its number and prompt.

Shows at most LARGEST images, about as many as fit a screen.
"""

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from imagemill.client.file_names import candidates, write_file
from jobs.sheet import Grid, fitted

LARGEST = 400
TILE, GAP, CAPTION = 176, 12, 34
"""Pixels: longer side of a thumbnail, space between tiles, height of a caption."""

MOST_COLUMNS = 12
INK, FAINT = "#222222", "#8a8a8a"

MARK = "imagemill-sheet"
"""The PNG text that marks a sheet as ours: the SHA-256 of its pixels, to spot edits."""


def sheet_place(folder: Path) -> Path:
    """`sheet.png`, or `sheet-2.png`, ...: the first that's free, or that `contact_sheet` wrote."""
    paths = candidates(folder / "sheet.png")
    return next(path for path in paths if not _exists(path) or _is_ours(path))


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with Image.open(path) as picture:
            mark = picture.info.get(MARK)
            return mark is not None and mark == _fingerprint(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _fingerprint(picture: Image.Image) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


def contact_sheet(images: Sequence[tuple[int, str, Path]], target: Path) -> None:
    """Write a PNG to `target` from (index, prompt, file) triples, in their order."""
    count = min(len(images), LARGEST)
    grid = Grid(count, columns_for(count), TILE, TILE + CAPTION, GAP)
    sheet = grid.blank()
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for position, (index, prompt, path) in enumerate(images[:LARGEST]):
        left, top = grid.place(position)
        thumbnail = fitted(path, TILE)
        shift = ((TILE - thumbnail.width) // 2, TILE - thumbnail.height)
        sheet.paste(thumbnail, (left + shift[0], top + shift[1]))
        _caption(draw, font, (left, top + TILE + 4), index, prompt)
    data = io.BytesIO()
    text = PngInfo()
    text.add_text(MARK, _fingerprint(sheet))
    sheet.save(data, "PNG", pnginfo=text)
    write_file(target, data.getvalue())


def columns_for(count: int) -> int:
    """Columns of a grid that's slightly wider than high, at most MOST_COLUMNS."""
    return max(1, min(MOST_COLUMNS, count, math.ceil(math.sqrt(count * 1.4))))


def _caption(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    place: tuple[int, int],
    index: int,
    prompt: str,
) -> None:
    """Draw the number and as much of the prompt as fits two lines."""
    number = f"{index:04d}  "
    draw.text(place, number, FAINT, font)
    indent = int(draw.textlength(number, font))
    first, rest = _fit(draw, font, " ".join(prompt.split()), TILE - indent, more=False)
    second, _ = _fit(draw, font, rest, TILE, more=True)
    draw.text((place[0] + indent, place[1]), first, INK, font)
    draw.text((place[0], place[1] + 14), second, INK, font)


def _fit(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str,
    width: int,
    *,
    more: bool,
) -> tuple[str, str]:
    """The words that fit into `width` pixels, and the rest; `more`: end with an ellipsis if cut."""
    words = text[:200].split(" ")
    for count in range(len(words), 0, -1):
        left_out = words[count:]
        line = " ".join(words[:count]) + ("…" if more and left_out else "")
        if draw.textlength(line, font) <= width:
            return line, " ".join(left_out)
    return _cut(draw, font, words[0], width), " ".join(words[1:])


def _cut(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    word: str,
    width: int,
) -> str:
    """As much of a long word as fits, with an ellipsis."""
    while word and draw.textlength(word + "…", font) > width:
        word = word[:-1]
    return word + "…"
