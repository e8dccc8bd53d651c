"""Encodes pixels as a picture file with its recipe inside.

The recipe is everything needed to make the picture again: the request, the model and its scheduler,
whether it's reproducible, the bucket it ran in, and the versions. PNG has it in text chunks
(`imagemill`: JSON; `parameters`: A1111's format), JPEG and WebP in EXIF (ImageDescription: JSON;
UserComment: A1111's format). All three also have it as XMP, for other programs.

A segment of a JPEG is at most 64 KiB. A longer recipe is split into APP15 segments, each of which
begins with `imagemill` and a zero byte.
"""

import io
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from PIL import ExifTags, Image, PngImagePlugin

from jobs.catalog import Model
from jobs.fields import FIELDS
from jobs.request import ImageFormat, ImageRequest
from pipelines.pixels import check_pixels
from pipelines.seam import Card, Sample
from workers import xmp

MEDIA_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}

EXIF_IMAGE_DESCRIPTION = 0x010E
EXIF_USER_COMMENT = 0x9286
EXIF_UNICODE = b"UNICODE\0"
"""Marks a UserComment as UTF-16; readers expect it big-endian."""

JPEG_SEGMENT = 65_000
"""Data bytes per segment: its 16-bit length also counts the length itself and a name."""

APP15, APP15_NAME = b"\xff\xef", b"imagemill\0"

PNG_COMPRESS_LEVEL = 4
"""zlib level: within a few percent of the default's size in less than half the time."""

LOSSY_QUALITY = 95

PREVIEW_SIDE, PREVIEW_QUALITY = 512, 80
"""Maximum of a preview's longer side in pixels, and its JPEG quality."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that affects a picture's bits.

    `bucket` is the size of the forward batch it ran in, in samples. `tiled` is set if it was
    decoded in tiles, because the device had no memory for the whole.
    """

    request: ImageRequest
    model_path: str
    model_revision: str | None
    dtype: str
    placement: str
    scheduler: str
    bucket: int
    versions: dict[str, str]
    attention_backend: str | None = None
    compile: bool = False
    cuda_graphs: bool = False
    quantization: str | None = None
    cache: str | None = None
    tiled: bool = False

    def facts(self) -> dict[str, Any]:
        """One flat object: the request's fields and the others."""
        fields: dict[str, Any] = asdict(self)
        return {**fields.pop("request"), **fields}

    def to_json(self, *, ascii_only: bool = False) -> str:
        """The facts as JSON."""
        return json.dumps(self.facts(), ensure_ascii=ascii_only)

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
            "Sampler": self.scheduler,
            **labelled,
            "Size": f"{r.width}x{r.height}",
            "Model": r.model,
            "Version": f"imagemill {self.versions['imagemill']}",
        }
        lines.append(", ".join(f"{label}: {_short(value)}" for label, value in settings.items()))
        return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache  # reading package metadata takes two milliseconds
def versions() -> dict[str, str]:
    """Versions of the packages that affect the picture made from a seed."""
    return {name: version(name) for name in ("imagemill", "torch", "diffusers", "transformers")}


def recipe(sample: Sample, model: Model, card: Card, bucket: int) -> Recipe:
    """Build the recipe of a decoded sample that ran in forward batches of `bucket`."""
    return Recipe(
        request=sample.request,
        model_path=model.path if not model.local else model.name,
        model_revision=model.revision,
        dtype=model.dtype,
        placement=model.placement,
        scheduler=card.scheduler,
        bucket=bucket,
        versions=versions(),
        attention_backend=model.attention_backend,
        compile=model.compile,
        cuda_graphs=model.cuda_graphs,
        quantization=model.quantization_text,
        cache=model.cache,
        tiled=bool(sample.extra.get("tiled")),
    )


def thumbnail(pixels: torch.Tensor) -> bytes:
    """Encode float32 [3, height, width] in 0..1 as a small JPEG preview, without a recipe."""
    picture = _picture(pixels)
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=PREVIEW_QUALITY)
    return out.getvalue()


def _picture(pixels: torch.Tensor) -> Image.Image:
    """Quantise as diffusers does: times 255, rounded to nearest.

    Raises ImageFailed for pixels that are NaN or outside 0..1, which would wrap around.
    """
    check_pixels(pixels)
    rounded = (pixels.permute(1, 2, 0) * 255).round().clamp(0, 255)
    return Image.fromarray(rounded.to(torch.uint8).numpy())


def encode(pixels: torch.Tensor, made: Recipe) -> bytes:
    """Encode float32 [3, height, width] in 0..1 as a file with its recipe; return its bytes."""
    picture = _picture(pixels)
    out = io.BytesIO()
    described = xmp.packet(made.facts())
    if made.request.format == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", made.parameters())
        info.add_itxt("imagemill", made.to_json())
        info.add_itxt("XML:com.adobe.xmp", described.decode())
        picture.save(out, "PNG", pnginfo=info, compress_level=PNG_COMPRESS_LEVEL)
    elif made.request.format == "webp":
        exif = _exif(made).tobytes()
        picture.save(out, "WEBP", exif=exif, xmp=described, quality=LOSSY_QUALITY)
    else:
        options = {"xmp": described, "quality": LOSSY_QUALITY}
        exif = _exif(made).tobytes()
        if len(exif) <= JPEG_SEGMENT:
            picture.save(out, "JPEG", exif=exif, **options)
        else:
            picture.save(out, "JPEG", extra=_segments(made.to_json().encode()), **options)
    return out.getvalue()


def _exif(made: Recipe) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_IMAGE_DESCRIPTION] = made.to_json(ascii_only=True)  # the tag is ASCII
    comment = EXIF_UNICODE + made.parameters().encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[EXIF_USER_COMMENT] = comment
    return exif


def _segments(data: bytes) -> bytes:
    """Split bytes of any length into APP15 segments of a JPEG."""
    pieces = [data[at : at + JPEG_SEGMENT] for at in range(0, len(data), JPEG_SEGMENT)]
    return b"".join(
        APP15 + (2 + len(APP15_NAME) + len(piece)).to_bytes(2, "big") + APP15_NAME + piece
        for piece in pieces
    )
