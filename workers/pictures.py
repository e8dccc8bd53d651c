"""Encodes pixels as picture files, and as previews."""

import io

import torch
from PIL import Image

from jobs.recipe import Recipe, save
from pipelines.pixels import check_pixels

PREVIEW_SIDE, PREVIEW_QUALITY = 512, 80
"""Maximum of a preview's longer side in pixels, and its JPEG quality."""


def encode(pixels: torch.Tensor, recipe: Recipe) -> bytes:
    """Encode float32 [3, height, width] in 0..1 as a file with its recipe; return its bytes."""
    return save(_picture(pixels), recipe)


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
