"""The recipe travels inside the picture and reads back equal."""

import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from jobs.request import ImageFormat, ImageRequest
from workers import recipe

REQUEST = ImageRequest(
    model="demo",
    prompt="a würfel, “quoted”, 図",
    seed=7,
    width=16,
    height=8,
    steps=4,
    guidance_scale=2.5,
    negative_prompt="blurry",
)


def made(image_format: ImageFormat) -> recipe.Recipe:
    """A recipe of REQUEST in this format."""
    return recipe.Recipe(
        request=replace(REQUEST, format=image_format),
        model_path="demo",
        model_revision=None,
        dtype="float32",
        placement="replica",
        scheduler="FlowMatchEulerDiscreteScheduler",
        bucket=2,
        versions=recipe.versions(),
    )


def test_png_holds_the_exact_pixels_and_both_forms_of_the_recipe() -> None:
    pixels = torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(0))
    picture = Image.open(io.BytesIO(recipe.encode(pixels, made("png"))))
    picture.load()
    told = json.loads(picture.info["imagemill"])
    assert told["prompt"] == REQUEST.prompt
    assert (told["seed"], told["bucket"], told["reproducible"]) == (7, 2, True)
    assert picture.info["parameters"].startswith(f"{REQUEST.prompt}\nNegative prompt: blurry\n")
    assert "Seed: 7, Size: 16x8" in picture.info["parameters"]
    expected = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8)
    assert torch.equal(
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8), expected.flatten()
    )


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_lossy_formats_hold_the_recipe_as_exif(image_format: ImageFormat) -> None:
    data = recipe.encode(torch.zeros(3, 8, 16), made(image_format))
    picture = Image.open(io.BytesIO(data))
    assert picture.format == image_format.upper()
    told = json.loads(picture.getexif()[recipe.EXIF_IMAGE_DESCRIPTION])
    assert told["steps"] == 4
    assert told["prompt"] == REQUEST.prompt
