"""Encodes images as escape sequences for the three terminal graphics protocols.

Each function returns a sequence that draws an image at the cursor, over `Place.columns` by
`Place.rows` characters. The cursor position afterwards differs between terminals. The functions are
pure. The protocols are specified at

    kitty    https://sw.kovidgoyal.net/kitty/graphics-protocol/
    iTerm2   https://iterm2.com/documentation-images.html
    sixel    DEC VT330/VT340 Programmer Reference Manual, volume 2, chapter 14
"""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageOps

from imagemill.terminal.detect import Pictures

KITTY_CHUNK = 4096
"""Maximum bytes of base64 in one kitty command."""

LARGEST = 320
"""Maximum width in pixels when the terminal scales the image itself."""

BAND = 6
"""Rows of pixels per line of sixels."""

COLOURS = 256

_APC, _OSC, _DCS, _BEL, _ST = "\x1b_G", "\x1b]", "\x1bP", "\x07", "\x1b\\"


@dataclass(frozen=True, slots=True)
class Place:
    """Where to draw an image: its size in characters, a character's size in pixels, and a number.

    An image replaces an earlier one with the same number, if the protocol has numbers.
    """

    columns: int
    rows: int
    cell: tuple[int, int]
    number: int


def kitty(picture: Image.Image, place: Place) -> str:
    """A PNG in chunks, shown immediately; `q=2` suppresses the terminal's answer."""
    data = base64.b64encode(_png(_scalable(picture, place))).decode()
    chunks = [data[at : at + KITTY_CHUNK] for at in range(0, len(data), KITTY_CHUNK)]
    how = f"a=T,f=100,i={place.number},p=1,c={place.columns},r={place.rows},C=1,"
    last = len(chunks) - 1
    return "".join(
        f"{_APC}{'' if at else how}q=2,m={int(at < last)};{chunk}{_ST}"
        for at, chunk in enumerate(chunks)
    )


def kitty_gone(number: int) -> str:
    """Delete an image in kitty, where erasing text doesn't remove images."""
    return f"{_APC}a=d,d=I,i={number},q=2{_ST}"


def iterm2(picture: Image.Image, place: Place) -> str:
    """A PNG as an inline file."""
    data = _png(_scalable(picture, place))
    facts = f"inline=1;size={len(data)};width={place.columns};height={place.rows}"
    text = base64.b64encode(data).decode()
    return f"{_OSC}1337;File={facts};preserveAspectRatio=0:{text}{_BEL}"


def sixel(picture: Image.Image, place: Place) -> str:
    """Lines of six rows, each drawn once per colour in it; never larger than its place."""
    width, height = place.columns * place.cell[0], place.rows * place.cell[1]
    height = max(BAND, height - height % BAND)  # a partial line would still take up six rows
    flat = ImageOps.pad(picture.convert("RGB"), (width, height)).quantize(COLOURS)
    levels = [round(level * 100 / 255) for level in flat.getpalette("RGB") or ()]
    registers = "".join(
        f"#{number};2;{levels[3 * number]};{levels[3 * number + 1]};{levels[3 * number + 2]}"
        for number in range(len(levels) // 3)
    )
    pixels = flat.tobytes()
    size = width * BAND
    bands = (_band(pixels[at : at + size], width) for at in range(0, len(pixels), size))
    return f'{_DCS}0;1;0q"1;1;{width};{height}{registers}{"-".join(bands)}{_ST}'


def _band(pixels: bytes, width: int) -> str:
    """Encode six rows of palette numbers as sixels: per number, a bit per pixel of a column."""
    lines: dict[int, bytearray] = {}
    for y in range(BAND):
        for x, number in enumerate(pixels[y * width : (y + 1) * width]):
            if number not in lines:
                lines[number] = bytearray(b"?" * width)
            lines[number][x] += 1 << y
    return "$".join(f"#{number}{_short(line.decode())}" for number, line in sorted(lines.items()))


def _short(line: str) -> str:
    """Shorten runs of four or more to a count, and drop trailing blanks."""
    return re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", line.rstrip("?"))


def _scalable(picture: Image.Image, place: Place) -> Image.Image:
    """Fit the image to the shape of its place, no larger than LARGEST."""
    across, down = place.columns * place.cell[0], place.rows * place.cell[1]
    width = min(across, LARGEST)
    return ImageOps.pad(picture.convert("RGB"), (width, max(1, round(width * down / across))))


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


PAINT: dict[Pictures, Callable[[Image.Image, Place], str]] = {
    Pictures.KITTY: kitty,
    Pictures.ITERM2: iterm2,
    Pictures.SIXEL: sixel,
}
