"""The recipe is stored in every format, and reads back the same."""

import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from jobs import xmp
from jobs.catalog import Model
from jobs.errors import NoRecipe
from jobs.recipe import (
    EXIF_UNICODE,
    JPEG_SEGMENT,
    Recipe,
    description,
    parameters,
    read_recipe,
    recipe_of,
    save,
    versions,
)
from jobs.request import ImageFormat, ImageRequest

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
FORMATS = ("png", "jpeg", "webp")


def recipe_in(image_format: ImageFormat, request: ImageRequest = REQUEST) -> Recipe:
    """A recipe of the request in this format."""
    return Recipe.of(
        replace(request, format=image_format),
        Model("demo", "/models/demo", local=True, dtype="float32"),
        scheduler="FlowMatchEulerDiscreteScheduler",
        bucket=2,
        tiled=False,
    )


def written(recipe: Recipe) -> Image.Image:
    """The picture with this recipe, opened again."""
    return Image.open(io.BytesIO(save(Image.new("RGB", (16, 8)), recipe)))


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_recipe_reads_back_the_same(tmp_path: Path, image_format: ImageFormat) -> None:
    recipe, path = recipe_in(image_format), tmp_path / "picture"
    path.write_bytes(save(Image.new("RGB", (16, 8)), recipe))
    assert read_recipe(path) == recipe
    assert recipe_of(path) == recipe.to_dict()
    with Image.open(path) as picture:
        assert picture.format == image_format.upper()
        assert parameters(picture) == recipe.parameters()


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_longest_possible_prompts_are_read_back(
    tmp_path: Path, image_format: ImageFormat
) -> None:
    """In any script, although a JPEG segment is at most 64 KiB."""
    longest = replace(REQUEST, prompt="図" * 10_000, negative_prompt="\U0001f3a8" * 10_000)
    path = tmp_path / "picture"
    path.write_bytes(save(Image.new("RGB", (16, 8)), recipe_in(image_format, longest)))
    assert read_recipe(path) == recipe_in(image_format, longest)


def test_keys_of_the_stored_recipe() -> None:
    stored = json.loads(written(recipe_in("png")).info["imagemill"])
    assert stored == {
        **json.loads(REQUEST.to_json()),
        "model_path": "demo",
        "model_revision": None,
        "dtype": "float32",
        "placement": "replica",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "bucket": 2,
        "versions": versions(),
        "attention_backend": None,
        "compile": False,
        "cuda_graphs": False,
        "quantization": None,
        "cache": None,
        "tiled": False,
    }
    assert set(versions()) == {"imagemill", "torch", "diffusers", "transformers"}


def test_a1111_parameters() -> None:
    text = parameters(written(recipe_in("png")))
    assert text is not None
    assert text.startswith(f"{REQUEST.prompt}\nNegative prompt: blurry\nSteps: 4, Sampler: Flow")
    assert "CFG scale: 2.5, Seed: 7, Size: 16x8, Model: demo" in text


def test_lossy_formats_have_a1111_parameters_in_utf_16() -> None:
    exif = written(recipe_in("jpeg")).getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(EXIF_UNICODE)
    text = comment.removeprefix(EXIF_UNICODE).decode("utf-16-be")
    assert text == recipe_in("jpeg").parameters()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": True}, "an invalid `seed`"),
        ({"format": "gif"}, "an invalid `format`"),
        ({"model": 7}, "an invalid `model`"),
        ({"prompt": None}, "an invalid `prompt`"),
    ],
)
def test_invalid_values_are_refused(changes: dict, reason: str) -> None:
    values = {**json.loads(REQUEST.to_json()), **changes}
    with pytest.raises(NoRecipe, match=reason):
        Recipe.from_dict(values)


def test_later_and_earlier_recipes_are_read() -> None:
    values = json.loads(REQUEST.to_json())
    del values["reproducible"]
    recipe = Recipe.from_dict({**values, "scheduler": "Euler", "mood": "blue"})
    assert recipe == Recipe(REQUEST, {"scheduler": "Euler", "mood": "blue"})


RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
OURS = f"{{{xmp.NAMESPACE}}}"


def described_by_xmp(image_format: ImageFormat) -> ElementTree.Element:
    """The XMP of a picture, found as any XMP reader finds it."""
    picture = written(recipe_in(image_format))
    picture.load()
    raw = picture.info.get("xmp") or picture.info["XML:com.adobe.xmp"].encode()
    element = ElementTree.fromstring(raw).find(f"{RDF}RDF/{RDF}Description")
    assert element is not None
    return element


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_has_the_recipe_in_xmp(image_format: ImageFormat) -> None:
    element = described_by_xmp(image_format)
    facts = {
        item.tag.removeprefix(OURS): item.text for item in element if item.tag.startswith(OURS)
    }
    assert (facts["seed"], facts["reproducible"]) == ("7", "True")
    assert facts["negative_prompt"] == "blurry"
    assert (facts["model"], facts["placement"], facts["steps"]) == ("demo", "replica", "4")
    assert facts["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert "model_revision" not in facts
    [torch_version] = [item.text for item in element.iter(f"{OURS}torch")]
    assert torch_version == versions()["torch"]
    [text] = [item.text for item in element.iter(f"{RDF}li")]
    assert text == REQUEST.prompt
    assert xmp.MADE_BY_A_MODEL in [item.text for item in element]


def test_warnings_are_stored_and_read_back(tmp_path: Path) -> None:
    warnings = ["the model reads 77 tokens", "a <b> & c"]
    recipe = recipe_in("webp")
    warned = replace(recipe, made_with={**recipe.made_with, "warnings": warnings})
    path = tmp_path / "picture"
    path.write_bytes(save(Image.new("RGB", (16, 8)), warned))
    assert read_recipe(path).facts()["warnings"] == warnings
    root = ElementTree.fromstring(xmp.packet(warned.to_dict()))
    [bag] = root.iter(f"{OURS}warnings")
    assert [item.text for item in bag.iter(f"{RDF}li")] == warnings


@pytest.mark.parametrize(
    "prompt",
    ["a <b> & \"c\" ]]> 'd'", "\x00\x1b[2J\ud800\ufffe", "&" * 10_000, "図" * 10_000],
    ids=["markup", "no XML", "long when escaped", "long in bytes"],
)
def test_xmp_is_valid_for_any_prompt(prompt: str) -> None:
    packet = xmp.packet(
        {"prompt": prompt, "negative_prompt": prompt, "versions": {"imagemill": "1"}}
    )
    assert len(packet) < JPEG_SEGMENT
    [text] = [item.text for item in ElementTree.fromstring(packet).iter(f"{RDF}li")]
    assert text is not None
    if prompt.startswith("a <b>"):
        assert text == prompt
    assert text[0] in (prompt[0], "\ufffd")


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
