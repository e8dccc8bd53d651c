"""The recipe inside a picture: everything needed to make the picture again.

`save` writes it: in PNG as text chunks (`imagemill`: JSON; `parameters`: A1111's format), in JPEG
and WebP as EXIF (ImageDescription: JSON; UserComment: A1111's format). All three also have it as
XMP, for other programs. A segment of a JPEG is at most 64 KiB, so a longer recipe is split into
APP15 segments, each of which begins with `imagemill` and a zero byte.

`read_recipe` reads it from a file and validates it, because files may come from anywhere;
`recipe_of`, `description` and `parameters` return what's there. Never imports torch.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from jobs import xmp
from jobs.catalog import Model
from jobs.errors import NoRecipe
from jobs.fields import FIELDS, PROMPT
from jobs.request import ImageRequest

PNG_CHUNK, PNG_PARAMETERS, PNG_XMP = "imagemill", "parameters", "XML:com.adobe.xmp"

EXIF_UNICODE = b"UNICODE\0"
"""Marks a UserComment as UTF-16; readers expect it big-endian."""

_CHARSETS = {EXIF_UNICODE: "utf-16-be", b"ASCII\0\0\0": "ascii"}

JPEG_SEGMENT = 65_000
"""Data bytes per segment: its 16-bit length also counts the length itself and a name."""

APP15, APP15_MARKER, APP15_NAME = "APP15", b"\xff\xef", b"imagemill\0"

PNG_COMPRESS_LEVEL = 4
"""zlib level: within a few percent of the default's size in less than half the time."""

LOSSY_QUALITY = 95


@dataclass(frozen=True, slots=True)
class Recipe:
    """The request a picture was made from, and `made_with`: whatever else affects its bits."""

    request: ImageRequest
    made_with: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        request: ImageRequest,
        model: Model,
        *,
        scheduler: str,
        bucket: int,
        tiled: bool,
        warnings: Sequence[str] = (),
    ) -> Self:
        """The recipe of a picture made by this process.

        `scheduler` is the class's name; `bucket` is the size of its forward batch, in samples.
        `tiled`: it was decoded in tiles, because the device had no memory for the whole.
        `warnings` are the image's; the key is absent without any.
        """
        return cls(
            request,
            {
                "model_path": model.name if model.local else model.path,
                "model_revision": model.revision,
                "dtype": model.dtype,
                "placement": model.placement,
                "scheduler": scheduler,
                "bucket": bucket,
                "versions": versions(),
                "attention_backend": model.attention_backend,
                "compile": model.compile,
                "cuda_graphs": model.cuda_graphs,
                "quantization": model.quantization_text,
                "cache": model.cache,
                "tiled": tiled,
                **({"warnings": list(warnings)} if warnings else {}),
            },
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises NoRecipe if the request is incomplete or invalid."""
        known = {item.name: item for item in fields(ImageRequest)}
        for name, item in known.items():
            if name not in values and item.default is MISSING:
                raise NoRecipe(f"its recipe lacks `{name}`")
            if name in values and not _is_valid(name, values[name]):
                raise NoRecipe(f"its recipe has an invalid `{name}`")
        request = ImageRequest(**{name: values[name] for name in values if name in known})
        return cls(request, {name: values[name] for name in values if name not in known})

    def to_dict(self) -> dict[str, Any]:
        """One flat JSON object, as stored: the request's fields and the others."""
        return {**asdict(self.request), **self.made_with}

    def facts(self) -> dict[str, Any]:
        """All values as one flat mapping for people, with an entry for each of `versions`."""
        flat = self.to_dict()
        packages = flat.pop("versions", None)
        packages = packages if isinstance(packages, dict) else {}
        return {**flat, **{f"{name} version": number for name, number in packages.items()}}

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """The values that differ between the two recipes, each as a pair."""
        here, there = self.facts(), other.facts()
        names = [*here, *(name for name in there if name not in here)]
        pairs = {name: (here.get(name), there.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def parameters(self) -> str:
        """The text in A1111's `parameters` format: prompt, negative prompt, settings."""
        r = self.request
        lines = [r.prompt]
        if r.negative_prompt:
            lines.append(f"Negative prompt: {r.negative_prompt}")
        labelled = {
            field.label: getattr(r, name)
            for name, field in FIELDS.items()
            if field.label and field.kind is not str
        }
        settings = {
            "Steps": labelled.pop("Steps"),  # readers look for this word to find the settings
            "Sampler": self.made_with["scheduler"],
            **labelled,
            "Size": f"{r.width}x{r.height}",
            "Model": r.model,
            "Version": f"imagemill {self.made_with['versions']['imagemill']}",
        }
        lines.append(", ".join(f"{label}: {_short(value)}" for label, value in settings.items()))
        return "\n".join(lines)


@cache  # reading package metadata takes two milliseconds
def versions() -> dict[str, str]:
    """Versions of the packages that affect the picture made from a seed."""
    return {name: version(name) for name in ("imagemill", "torch", "diffusers", "transformers")}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_valid(name: str, value: Any) -> bool:
    if name == "model":
        return isinstance(value, str)
    return {"prompt": PROMPT, **FIELDS}[name].accepts(value)


def save(picture: Image.Image, recipe: Recipe) -> bytes:
    """Encode an RGB picture in the request's format, with its recipe; return the file's bytes."""
    out = io.BytesIO()
    described = xmp.packet(recipe.to_dict())
    if recipe.request.format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(PNG_PARAMETERS, recipe.parameters())
        chunks.add_itxt(PNG_CHUNK, _json(recipe))
        chunks.add_itxt(PNG_XMP, described.decode())
        picture.save(out, "PNG", pnginfo=chunks, compress_level=PNG_COMPRESS_LEVEL)
    elif recipe.request.format == "webp":
        exif = _exif(recipe).tobytes()
        picture.save(out, "WEBP", exif=exif, xmp=described, quality=LOSSY_QUALITY)
    else:
        options = {"xmp": described, "quality": LOSSY_QUALITY}
        exif = _exif(recipe).tobytes()
        if len(exif) <= JPEG_SEGMENT:
            picture.save(out, "JPEG", exif=exif, **options)
        else:
            picture.save(out, "JPEG", extra=_split(_json(recipe).encode()), **options)
    return out.getvalue()


def _json(recipe: Recipe, *, ascii_only: bool = False) -> str:
    return json.dumps(recipe.to_dict(), ensure_ascii=ascii_only)


def _exif(recipe: Recipe) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = _json(recipe, ascii_only=True)  # the tag is ASCII
    comment = EXIF_UNICODE + recipe.parameters().encode(_CHARSETS[EXIF_UNICODE])
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif


def _split(data: bytes) -> bytes:
    """Bytes of any length as APP15 segments of a JPEG."""
    pieces = [data[at : at + JPEG_SEGMENT] for at in range(0, len(data), JPEG_SEGMENT)]
    return b"".join(
        APP15_MARKER + (2 + len(APP15_NAME) + len(piece)).to_bytes(2, "big") + APP15_NAME + piece
        for piece in pieces
    )


def _joined(picture: Image.Image) -> str | None:
    """The text in the APP15 segments that `_split` made."""
    segments: list[tuple[str, bytes]] = getattr(picture, "applist", [])
    ours = [data for name, data in segments if name == APP15 and data.startswith(APP15_NAME)]
    return b"".join(data.removeprefix(APP15_NAME) for data in ours).decode("utf-8") or None


def description(picture: Image.Image) -> str | None:
    """The recipe's JSON in an open picture, or whatever text is in its place."""
    if picture.format == "PNG":
        text = picture.info.get(PNG_CHUNK)
    else:
        text = picture.getexif().get(ExifTags.Base.ImageDescription) or _joined(picture)
    return None if text is None else str(text)


def parameters(picture: Image.Image) -> str | None:
    """The settings in A1111's format, as written in an open picture."""
    text = picture.info.get(PNG_PARAMETERS)
    if text is None and picture.format != "PNG":
        text = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(text, bytes):
        charset = _CHARSETS.get(text[:8])
        return text[8:].decode(charset, "replace") if charset else None
    return None if text is None else str(text)


def recipe_of(path: Path) -> dict[str, Any] | None:
    """The recipe in a file as it's stored; None if it has none or isn't a picture."""
    try:
        return _stored(path)
    except NoRecipe:
        return None


def read_recipe(path: Path) -> Recipe:
    """The valid recipe in a file. Raises NoRecipe. Decodes no pixels."""
    values = _stored(path)
    if "prompt" not in values:
        raise NoRecipe(f"{path}: its description isn't an imagemill recipe")
    try:
        return Recipe.from_dict(values)
    except NoRecipe as error:
        raise NoRecipe(f"{path}: {error}") from error


def _stored(path: Path) -> dict[str, Any]:
    """The JSON object in a picture's description. Raises NoRecipe."""
    try:
        with Image.open(path) as picture:
            text = description(picture)
    except UnidentifiedImageError as error:
        raise NoRecipe(f"{path}: not an image") from error
    except OSError as error:
        raise NoRecipe(f"{path}: {error.strerror or 'the image is truncated'}") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NoRecipe(f"{path}: couldn't read the image: {error}") from error
    if not text:
        raise NoRecipe(f"{path}: this image has no imagemill recipe")
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise NoRecipe(f"{path}: its description isn't an imagemill recipe")
    return values
