"""What a family must implement for a placement: the seam's four verbs, on one device.

A family is built around a diffusers pipeline whose components a placement has put somewhere. It
decides nothing about memory, caching, gradients or devices.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from jobs.request import ImageRequest
from pipelines.seam import Card, Conditioning, Sample

Role = Literal["positive", "negative"]

REFUSED = "refused by the model's safety checker"
"""The error of an image that a checkpoint's own safety checker does not let out."""


class Family(Protocol):
    """One kind of model. Whatever the seam has too, is as the seam says."""

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline that it is built around."""

    @property
    def card(self) -> Card:
        """What the model is."""

    def tokenizer_json(self) -> str | None:
        """The tokenizer that `card.max_prompt_tokens` counts by; None without a `card.prompt`."""

    def batch_key(self, request: ImageRequest) -> Hashable:
        """What requests must share to run in one forward pass."""

    def rows(self, request: ImageRequest) -> int:
        """Rows of the forward batch that one sample takes."""

    def tokens(self, request: ImageRequest) -> int:
        """Image tokens of one row."""

    def texts(self, request: ImageRequest) -> Mapping[Role, str | None]:
        """What the text encoders must read for this request, each text once."""

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """The embeddings of one text, each [1, ...]; a pure function of text and role."""

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample at step 0; the negative text's tensors are named with `batch.NEGATIVE`."""

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One forward pass; when it raises, no sample has changed."""

    def decode(self, sample: Sample) -> torch.Tensor:
        """Pixels [3, height, width] in 0..1, any float dtype, on any device."""
