"""Read a whole call's output: images in one form, and the safety checker's verdicts.

Pipelines return `images`, `image`, `frames` or `rgb`, or a tuple that starts with them. These are
PIL images, arrays or tensors. A safety checker's verdict has one of three names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.errors import ImageFailed

PICTURES = ("images", "image", "frames", "rgb")
"""Attributes of diffusers' outputs that hold images."""

VERDICTS = ("nsfw_content_detected", "nsfw_detected", "watermark_detected")
"""Attributes with the verdict of the checkpoint's own safety checker for each image."""


def pictures(output: Any, name: str, count: int) -> list[torch.Tensor]:
    """The `count` images of an output of the class `name`, each float32 [3, height, width].

    Values are the pipeline's own, normally 0..1. A video of one frame counts as an image. Raises
    ImageFailed for another number of images or none.
    """
    items = _items(output)
    if items is None:
        raise ImageFailed(f"{name} returned no images but {type(output).__name__}")
    images = [_only_frame(item, name) if _is_video(item) else item for item in items]
    if len(images) != count:
        raise ImageFailed(f"{name} returned {len(images)} images for {count} prompts")
    return [_tensor(image, name) for image in images]


def refused(output: Any, count: int) -> list[bool]:
    """For each of `count` images, whether the checkpoint's safety checker has refused it."""
    verdicts = [getattr(output, name, None) for name in VERDICTS]
    lists = [list(verdict) for verdict in verdicts if verdict is not None]
    return [any(bool(verdict[at]) for verdict in lists if at < len(verdict)) for at in range(count)]


def _items(output: Any) -> Any:
    if isinstance(output, tuple):
        return output[0] if output else None
    values = (getattr(output, name, None) for name in PICTURES)
    return next((value for value in values if value is not None), None)


def _is_video(item: Any) -> bool:
    return isinstance(item, list) or getattr(item, "ndim", 0) == 4


def _only_frame(frames: Sequence[Any], name: str) -> Any:
    if len(frames) != 1:
        raise ImageFailed(f"{name} returned {len(frames)} frames instead of 1")
    return frames[0]


def _tensor(picture: Any, name: str) -> torch.Tensor:
    """A PIL image, an array [height, width, channels] or a tensor [channels, height, width]."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    if isinstance(picture, np.ndarray):
        shaped = picture if picture.ndim == 3 else np.atleast_3d(picture)
        pixels = torch.from_numpy(shaped.copy()).permute(2, 0, 1)
    else:
        pixels = picture.detach().cpu()
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ImageFailed(f"{name} returned an image of shape {list(pixels.shape)}, not RGB")
    scale = 1 if pixels.is_floating_point() else 255
    return (pixels.float() / scale).expand(3, -1, -1)
