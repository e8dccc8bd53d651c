"""One image's parameters, as a frozen value.

A request travels as JSON from the service through Redis to a worker, and ends up as the recipe
inside the picture. This module is independent of the queue, the models and HTTP.
"""

import json
from dataclasses import dataclass, fields
from typing import Any, Literal

ImageFormat = Literal["png", "jpeg", "webp"]

MAX_SEED = 2**53 - 1
"""The largest integer that every JSON reader keeps exact (RFC 8259, section 6)."""

MAX_PROMPT_CHARACTERS = 10_000

MAX_COPIES = 10_000
"""Most copies of one prompt in one job, for every model."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image: what to draw and how.

    `width` and `height` are in pixels, `steps` are denoising steps, `seed` is 0..MAX_SEED.
    `guidance_scale` makes the picture follow the prompt: through embedded guidance if the
    transformer has it, and classifier-free guidance otherwise. `negative_prompt` belongs to the
    latter; None means the caller set none. `reproducible` asks for bits that don't depend on what
    else ran at the same time.
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
        """Width times height."""
        return self.width * self.height

    def to_json(self) -> str:
        """All fields as compact JSON, as stored in Redis."""
        return _ENCODE({name: getattr(self, name) for name in _NAMES})

    @classmethod
    def from_json(cls, text: str | bytes) -> "ImageRequest":
        """The inverse of `to_json`; an unknown field raises TypeError."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values)


# Built once, because a POST may encode 10,000 images; `asdict` would take 200 ms for that.
_ENCODE = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_NAMES = tuple(item.name for item in fields(ImageRequest))
