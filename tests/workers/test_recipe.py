"""The recipe travels inside the picture and reads back equal."""

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


RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
OURS = f"{{{xmp.NAMESPACE}}}"


def described(image_format: ImageFormat, prompt: str = REQUEST.prompt) -> ElementTree.Element:
    """The XMP of a picture, as a reader that knows nothing of us finds it."""
    one = made(image_format)
    one = replace(one, request=replace(one.request, prompt=prompt))
    picture = Image.open(io.BytesIO(recipe.encode(torch.zeros(3, 8, 16), one)))
    picture.load()
    raw = picture.info.get("xmp") or picture.info["XML:com.adobe.xmp"].encode()
    found = ElementTree.fromstring(raw).find(f"{RDF}RDF/{RDF}Description")
    assert found is not None
    return found


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_every_format_says_the_same_as_xmp(image_format: ImageFormat) -> None:
    found = described(image_format)
    told = {item.tag.removeprefix(OURS): item.text for item in found if item.tag.startswith(OURS)}
    assert (told["seed"], told["reproducible"]) == ("7", "True")
    assert told["negative_prompt"] == "blurry"
    assert (told["model"], told["placement"], told["steps"]) == ("demo", "replica", "4")
    assert told["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert "model_revision" not in told
    [torch_version] = [one.text for one in found.iter(f"{OURS}torch")]
    assert torch_version == recipe.versions()["torch"]
    [text] = [one.text for one in found.iter(f"{RDF}li")]
    assert text == REQUEST.prompt
    assert xmp.MADE_BY_A_MODEL in [one.text for one in found]


@pytest.mark.parametrize(
    "prompt",
    ["a <b> & \"c\" ]]> 'd'", "\x00\x1b[2J\ud800\ufffe", "&" * 10_000, "図" * 10_000],
    ids=["markup", "no XML", "long when escaped", "long in bytes"],
)
def test_xmp_is_valid_whatever_the_prompt(prompt: str) -> None:
    found = xmp.packet(
        {"prompt": prompt, "negative_prompt": prompt, "versions": {"imagemill": "1"}}
    )
    assert len(found) < recipe.JPEG_SEGMENT
    [text] = [one.text for one in ElementTree.fromstring(found).iter(f"{RDF}li")]
    assert text is not None
    if prompt.startswith("a <b>"):
        assert text == prompt
    assert text[0] in (prompt[0], "\ufffd")


def test_a_lossy_picture_holds_the_form_that_a1111_reads() -> None:
    picture = Image.open(io.BytesIO(recipe.encode(torch.zeros(3, 8, 16), made("jpeg"))))
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif)[recipe.EXIF_USER_COMMENT]
    assert comment.startswith(recipe.EXIF_UNICODE)
    said = comment.removeprefix(recipe.EXIF_UNICODE).decode("utf-16-be")
    assert said == made("jpeg").parameters()


@pytest.mark.parametrize("value", [-1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_pixels_that_would_wrap_around_are_no_picture(
    value: float, image_format: ImageFormat
) -> None:
    pixels = torch.full((3, 8, 16), 0.5)
    pixels[1, 2, 3] = value
    with pytest.raises(ImageFailed):
        recipe.encode(pixels, made(image_format))
    with pytest.raises(ImageFailed):
        recipe.thumbnail(pixels)
