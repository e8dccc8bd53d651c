"""Images encoded as escape sequences, and decoded again like a terminal does."""

import random

import pytest
from PIL import Image, ImageChops, ImageOps, ImageStat

from imagemill.terminal.detect import Pictures
from imagemill.terminal.graphics import LARGEST, PAINT, Place, kitty_gone
from tests.imagemill.terminals import Seen, Shown

RAMP = Image.linear_gradient("L").resize((96, 96))
COLOURFUL = Image.merge("RGB", (RAMP, RAMP.rotate(90), RAMP.rotate(180)))


def noise(side: int) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random.Random(7).randbytes(3 * side * side))


def drawn(kind: Pictures, picture: Image.Image, place: Place) -> Shown:
    """The image as a terminal shows it."""
    seen = Seen(PAINT[kind](picture, place), columns=80, cell=place.cell)
    assert len(seen.pictures) == 1
    shown = seen.pictures[0]
    assert (shown.row, shown.column) == (0, 0)
    return shown


@pytest.mark.parametrize("kind", [Pictures.KITTY, Pictures.ITERM2])
@pytest.mark.parametrize("picture", [COLOURFUL, noise(200)], ids=["colourful", "noise"])
def test_a_png_arrives_as_it_was_sent(kind: Pictures, picture: Image.Image) -> None:
    shown = drawn(kind, picture, Place(24, 12, (10, 20), 5))
    assert (shown.columns, shown.rows) == (24, 12)
    expected = ImageOps.pad(picture, (240, 240))
    assert ImageChops.difference(shown.picture, expected).getbbox() is None


def test_a_large_image_is_shrunk_and_sent_in_chunks() -> None:
    sent = PAINT[Pictures.KITTY](noise(400), Place(24, 12, (40, 80), 5))
    assert sent.count("\x1b_G") > 20  # the emulated terminal checks the length of each chunk
    shown = drawn(Pictures.KITTY, noise(400), Place(24, 12, (40, 80), 5))
    assert shown.picture.size == (LARGEST, LARGEST)


def test_kitty_replaces_and_deletes_images_by_number() -> None:
    place = Place(4, 2, (10, 20), 9)
    twice = PAINT[Pictures.KITTY](COLOURFUL, place) * 2
    assert len(Seen(twice, 80).pictures) == 1
    assert Seen(twice + kitty_gone(8), 80).pictures != []
    assert Seen(twice + kitty_gone(9), 80).pictures == []


@pytest.mark.parametrize(
    ("place", "size"),
    [
        (Place(24, 12, (10, 20), 1), (240, 240)),
        (Place(16, 8, (9, 19), 1), (144, 150)),
        (Place(5, 2, (8, 16), 1), (40, 30)),
    ],
)
@pytest.mark.parametrize("picture", [COLOURFUL, noise(64)], ids=["colourful", "noise"])
def test_sixels_are_the_picture_in_256_colours(
    place: Place, size: tuple[int, int], picture: Image.Image
) -> None:
    """Colours are rounded to percent; whole lines of six rows stay within the place."""
    shown = drawn(Pictures.SIXEL, picture, place)
    assert shown.picture.size == size
    assert shown.rows <= place.rows
    whole = ImageOps.pad(picture, size)
    expected = whole.quantize(256).convert("RGB")
    bands = ImageChops.difference(shown.picture, expected).split()
    assert max(level for band in bands for level in range(256) if band.histogram()[level]) <= 2
    if picture is COLOURFUL:
        assert max(ImageStat.Stat(ImageChops.difference(shown.picture, whole)).mean) < 8


def test_one_colour_takes_few_bytes() -> None:
    place = Place(24, 12, (10, 20), 1)
    assert len(PAINT[Pictures.SIXEL](Image.new("RGB", (64, 64), "#fa820a"), place)) < 600


@pytest.mark.parametrize("kind", list(PAINT))
def test_a_wide_image_is_padded_instead_of_stretched(kind: Pictures) -> None:
    shown = drawn(kind, Image.new("RGB", (64, 32), "white"), Place(24, 12, (10, 20), 1))
    assert shown.picture.getpixel((120, 20)) == (0, 0, 0)
    assert shown.picture.getpixel((120, 120)) == (255, 255, 255)
