"""One image's parameters, frozen, and what they cost.

Knows no queue, no model and no HTTP: a request is a value that travels as JSON from the service
through Redis to a worker, and ends as the recipe inside the picture.
"""

import json
from dataclasses import dataclass, fields
from typing import Any, Literal

ImageFormat = Literal["png", "jpeg", "webp"]

MAX_SEED = 2**53 - 1
"""The largest seed: the largest integer that every JSON reader keeps exact (RFC 8259, 6)."""

MAX_PROMPT_CHARACTERS = 10_000

MAX_COPIES = 10_000
"""Copies of one prompt in one job, whatever a model allows."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image: what to draw and how.

    `width` and `height` are pixels, `steps` denoising steps, `seed` 0..MAX_SEED.
    `guidance_scale` makes the picture follow the prompt: the embedded guidance where the
    transformer has one, classifier-free guidance elsewhere. `negative_prompt` belongs to the
    latter; None means that the caller gave none. `reproducible` asks for bits that do not depend
    on what ran beside the image.
    """

    model: str
    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float
    negative_prompt: str | None = None
    format: ImageFormat = "png"
    reproducible: bool = True

    @property
    def pixels(self) -> int:
        """Width times height: what one forward pass over the image costs, in pixels."""
        return self.width * self.height

    def to_json(self) -> str:
        """Compact JSON of all fields, as kept in Redis."""
        return _ENCODE({name: getattr(self, name) for name in _NAMES})

    @classmethod
    def from_json(cls, text: str | bytes) -> "ImageRequest":
        """The inverse of `to_json`; a field it does not know raises TypeError."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values)


# Made once: a job of 10,000 images is encoded within a POST, where `asdict` takes 200 ms.
_ENCODE = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_NAMES = tuple(item.name for item in fields(ImageRequest))
