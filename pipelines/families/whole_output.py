"""What a whole call returns, as pictures in one form whatever the class calls or stores them.

Pipelines return `images`, `image`, `frames` or `rgb`, or a tuple that begins with them; PIL images,
arrays or tensors; and a safety checker's verdict by one of three names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.errors import ImageFailed

PICTURES = ("images", "image", "frames", "rgb")
"""Attributes of diffusers' outputs that hold pictures."""

VERDICTS = ("nsfw_content_detected", "nsfw_detected", "watermark_detected")
"""Attributes that say, image by image, what the checkpoint's own safety checker has refused."""


def pictures(output: Any, name: str, count: int) -> list[torch.Tensor]:
    """`count` pictures of an output of the class `name`, each float32 [3, height, width].

    Their values are as the pipeline made them: 0..1, unless something is wrong with them. A video
    of one frame is a picture. Raises ImageFailed for another number of pictures or for none.
    """
    held = _held(output)
    if held is None:
        raise ImageFailed(f"{name} makes no images but {type(output).__name__}")
    each = [_only_frame(item, name) if _is_video(item) else item for item in held]
    if len(each) != count:
        raise ImageFailed(f"{name} made {len(each)} images of {count} prompts")
    return [_tensor(picture, name) for picture in each]


def refused(output: Any, count: int) -> list[bool]:
    """For each of `count` images, whether the checkpoint's safety checker has refused it."""
    verdicts = [getattr(output, name, None) for name in VERDICTS]
    given = [list(verdict) for verdict in verdicts if verdict is not None]
    return [any(bool(verdict[at]) for verdict in given if at < len(verdict)) for at in range(count)]


def _held(output: Any) -> Any:
    if isinstance(output, tuple):
        return output[0] if output else None
    return next((held for n in PICTURES if (held := getattr(output, n, None)) is not None), None)


def _is_video(item: Any) -> bool:
    return isinstance(item, list) or getattr(item, "ndim", 0) == 4


def _only_frame(frames: Sequence[Any], name: str) -> Any:
    if len(frames) != 1:
        raise ImageFailed(f"{name} made {len(frames)} frames where 1 was asked for")
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
        raise ImageFailed(f"{name} made a picture of the shape {list(pixels.shape)}, not RGB")
    scale = 1 if pixels.is_floating_point() else 255
    return (pixels.float() / scale).expand(3, -1, -1)
