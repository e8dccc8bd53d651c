"""Reading recipes back from where workers write them in pictures."""

import io
import json
from pathlib import Path

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from jobs.recipe import description, parameters, recipe_of

RECIPE = {"prompt": "ä 図", "seed": 7}
TEXT = json.dumps(RECIPE)
SETTINGS = "ä 図\nSteps: 8, Seed: 7"


def png() -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", SETTINGS)
    chunks.add_itxt("imagemill", TEXT)
    return saved("PNG", pnginfo=chunks)


def described(kind: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = TEXT
    comment = b"UNICODE\0" + SETTINGS.encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return saved(kind, exif=exif.tobytes())


def saved(kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [png(), described("JPEG"), described("WEBP")])
def test_recipe_and_settings_are_read_from_every_format(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "picture"
    path.write_bytes(data)
    assert recipe_of(path) == RECIPE
    with Image.open(path) as picture:
        assert (json.loads(description(picture) or ""), parameters(picture)) == (RECIPE, SETTINGS)


def test_a_long_recipe_is_in_several_segments_of_a_jpeg(tmp_path: Path) -> None:
    middle = len(TEXT.encode()) // 2
    extra = b""
    for piece in (TEXT.encode()[:middle], TEXT.encode()[middle:]):
        body = b"imagemill\0" + piece
        extra += b"\xff\xef" + (2 + len(body)).to_bytes(2, "big") + body
    path = tmp_path / "picture"
    path.write_bytes(saved("JPEG", extra=extra))
    assert recipe_of(path) == RECIPE


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_without_text_has_no_recipe(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(saved(kind))
    assert recipe_of(path) is None
    with Image.open(path) as picture:
        assert (description(picture), parameters(picture)) == (None, None)


@pytest.mark.parametrize("data", [b"", b"x", png()[:40], png().replace(TEXT.encode(), b"[" * 99)])
def test_a_file_that_is_not_a_picture_has_no_recipe(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "picture"
    path.write_bytes(data)
    assert recipe_of(path) is None
    assert recipe_of(tmp_path / "none") is None
