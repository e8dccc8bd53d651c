"""What a placement requires of a family: the seam's four verbs, on one device.

A family is built around a diffusers pipeline whose components a placement has put on devices. It
doesn't deal with memory, caching, gradients or devices.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from jobs.request import ImageRequest
from pipelines.seam import Card, Conditioning, Sample

Role = Literal["positive", "negative"]

REFUSED = "refused by the model's safety checker"
"""The error of an image that the checkpoint's own safety checker refuses."""


class Family(Protocol):
    """One kind of model. Methods that the seam also has work as described there."""

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline that the family is built around."""

    @property
    def card(self) -> Card:
        """What the model is."""

    def tokenizer_json(self) -> str | None:
        """The tokenizer for `card.max_prompt_tokens`, as JSON; None without a `card.prompt`."""

    def batch_key(self, request: ImageRequest) -> Hashable:
        """What requests must share to run in one forward pass."""

    def rows(self, request: ImageRequest) -> int:
        """Rows of the forward batch that one sample takes."""

    def tokens(self, request: ImageRequest) -> int:
        """Image tokens of one row."""

    def texts(self, request: ImageRequest) -> Mapping[Role, str | None]:
        """The texts that must be encoded for this request, by role."""

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """The embeddings of one text, each [1, ...]; a pure function of text and role."""

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample at step 0; names of the negative text's tensors begin with `batch.NEGATIVE`."""

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """Run one forward pass; if it raises, no sample has changed."""

    def decode(self, sample: Sample) -> torch.Tensor:
        """Pixels [3, height, width] in 0..1, any float dtype, on any device."""
