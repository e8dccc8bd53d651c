"""The recipe is stored in the picture and reads back the same."""

import io
import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from PIL import ExifTags, Image

from jobs.errors import ImageFailed
from jobs.request import ImageFormat, ImageRequest
from workers import recipe, xmp

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


def recipe_in(image_format: ImageFormat) -> recipe.Recipe:
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


def test_png_has_exact_pixels_and_both_recipe_formats() -> None:
    pixels = torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(0))
    picture = Image.open(io.BytesIO(recipe.encode(pixels, recipe_in("png"))))
    picture.load()
    facts = json.loads(picture.info["imagemill"])
    assert facts["prompt"] == REQUEST.prompt
    assert (facts["seed"], facts["bucket"], facts["reproducible"]) == (7, 2, True)
    assert picture.info["parameters"].startswith(f"{REQUEST.prompt}\nNegative prompt: blurry\n")
    assert "Seed: 7, Size: 16x8" in picture.info["parameters"]
    expected = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8)
    assert torch.equal(
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8), expected.flatten()
    )


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_lossy_formats_have_the_recipe_in_exif(image_format: ImageFormat) -> None:
    data = recipe.encode(torch.zeros(3, 8, 16), recipe_in(image_format))
    picture = Image.open(io.BytesIO(data))
    assert picture.format == image_format.upper()
    facts = json.loads(picture.getexif()[recipe.EXIF_IMAGE_DESCRIPTION])
    assert facts["steps"] == 4
    assert facts["prompt"] == REQUEST.prompt


RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
OURS = f"{{{xmp.NAMESPACE}}}"


def described(image_format: ImageFormat, prompt: str = REQUEST.prompt) -> ElementTree.Element:
    """The XMP of a picture, found as any XMP reader finds it."""
    base = recipe_in(image_format)
    changed = replace(base, request=replace(base.request, prompt=prompt))
    picture = Image.open(io.BytesIO(recipe.encode(torch.zeros(3, 8, 16), changed)))
    picture.load()
    raw = picture.info.get("xmp") or picture.info["XML:com.adobe.xmp"].encode()
    element = ElementTree.fromstring(raw).find(f"{RDF}RDF/{RDF}Description")
    assert element is not None
    return element


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_every_format_has_the_recipe_in_xmp(image_format: ImageFormat) -> None:
    element = described(image_format)
    facts = {
        item.tag.removeprefix(OURS): item.text for item in element if item.tag.startswith(OURS)
    }
    assert (facts["seed"], facts["reproducible"]) == ("7", "True")
    assert facts["negative_prompt"] == "blurry"
    assert (facts["model"], facts["placement"], facts["steps"]) == ("demo", "replica", "4")
    assert facts["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert "model_revision" not in facts
    [torch_version] = [item.text for item in element.iter(f"{OURS}torch")]
    assert torch_version == recipe.versions()["torch"]
    [text] = [item.text for item in element.iter(f"{RDF}li")]
    assert text == REQUEST.prompt
    assert xmp.MADE_BY_A_MODEL in [item.text for item in element]


@pytest.mark.parametrize(
    "prompt",
    ["a <b> & \"c\" ]]> 'd'", "\x00\x1b[2J\ud800\ufffe", "&" * 10_000, "図" * 10_000],
    ids=["markup", "no XML", "long when escaped", "long in bytes"],
)
def test_xmp_is_valid_for_any_prompt(prompt: str) -> None:
    packet = xmp.packet(
        {"prompt": prompt, "negative_prompt": prompt, "versions": {"imagemill": "1"}}
    )
    assert len(packet) < recipe.JPEG_SEGMENT
    [text] = [item.text for item in ElementTree.fromstring(packet).iter(f"{RDF}li")]
    assert text is not None
    if prompt.startswith("a <b>"):
        assert text == prompt
    assert text[0] in (prompt[0], "\ufffd")


def test_lossy_formats_have_a1111_parameters() -> None:
    picture = Image.open(io.BytesIO(recipe.encode(torch.zeros(3, 8, 16), recipe_in("jpeg"))))
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif)[recipe.EXIF_USER_COMMENT]
    assert comment.startswith(recipe.EXIF_UNICODE)
    text = comment.removeprefix(recipe.EXIF_UNICODE).decode("utf-16-be")
    assert text == recipe_in("jpeg").parameters()


@pytest.mark.parametrize("value", [-1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_invalid_pixels_fail(value: float, image_format: ImageFormat) -> None:
    pixels = torch.full((3, 8, 16), 0.5)
    pixels[1, 2, 3] = value
    with pytest.raises(ImageFailed):
        recipe.encode(pixels, recipe_in(image_format))
    with pytest.raises(ImageFailed):
        recipe.thumbnail(pixels)
