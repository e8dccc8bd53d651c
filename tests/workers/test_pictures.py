"""Pixels become picture files: exactly, with their recipe, and never if they're invalid."""

import io

import pytest
import torch
from PIL import Image

from jobs.catalog import Model
from jobs.errors import ImageFailed
from jobs.recipe import Recipe
from jobs.request import ImageFormat, ImageRequest
from workers import pictures


def recipe(image_format: ImageFormat) -> Recipe:
    request = ImageRequest("demo", "a ring", 7, 16, 8, 4, 2.5, format=image_format)
    return Recipe.of(request, Model("demo", "x"), scheduler="Euler", bucket=2, tiled=False)


def test_png_has_the_exact_pixels() -> None:
    pixels = torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(0))
    picture = Image.open(io.BytesIO(pictures.encode(pixels, recipe("png"))))
    expected = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8)
    assert torch.equal(
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8), expected.flatten()
    )


def test_previews_are_small() -> None:
    picture = Image.open(io.BytesIO(pictures.thumbnail(torch.zeros(3, 600, 1200))))
    assert (picture.format, picture.size) == ("JPEG", (512, 256))


@pytest.mark.parametrize("value", [-1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_invalid_pixels_fail(value: float, image_format: ImageFormat) -> None:
    pixels = torch.full((3, 8, 16), 0.5)
    pixels[1, 2, 3] = value
    with pytest.raises(ImageFailed):
        pictures.encode(pixels, recipe(image_format))
    with pytest.raises(ImageFailed):
        pictures.thumbnail(pixels)
