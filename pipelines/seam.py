"""The interface between the worker and the models.

A family (the mathematics of one kind of model) and a placement (where its weights are) together
make a `Pipeline`. The worker mostly calls these four methods:

    encode(requests)  -> conditionings    text encoders
    start(request, conditioning) -> Sample    seeded latents and a schedule of its own
    step(samples, bucket) -> None         one forward pass over samples at different steps
    decode(samples)   -> pixels           VAE

Nothing here depends on Redis or HTTP. The worker calls `encode`, `step` and `decode` each from its
own thread. Only `step` may run in several threads at once, up to `in_flight`, on different samples.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from jobs.reports import Card, PromptForm
from jobs.request import ImageRequest

__all__ = ["ROUND", "Card", "Conditioning", "Pipeline", "PromptForm", "Sample"]

ROUND = 64
"""Most images per round of a phased pipeline; their embeddings are all held at the same time."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The text encoders' output for one text or one request: tensors by name, one row each.

    `truncated`: a text had more tokens than `Card.max_prompt_tokens`. For a request, `cut` names
    these texts ("prompt", "negative prompt"). The worker adds a warning about them to the image.
    """

    tensors: dict[str, torch.Tensor]
    truncated: bool = False
    cut: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes held by the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(slots=True)
class Sample:
    """An image request in flight.

    `latents` has the family's own shape with batch dimension 1; None for families without latents
    between steps. `step` counts finished denoising steps, 0..`steps`. `step()` sets `error` if only
    this sample failed (NaN latents, a safety checker): the worker then drops it, and the rest of
    the batch continues. The worker sets `cancelled` while a long `step()` runs; a family whose step
    is a whole call returns early once all samples are cancelled.
    """

    request: ImageRequest
    conditioning: Conditioning
    latents: torch.Tensor | None
    scheduler: Any
    steps: int
    step: int = 0
    error: str | None = None
    cancelled: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether denoising is finished and `decode` may be called."""
        return self.step >= self.steps


class Pipeline(Protocol):
    """A family under a placement.

    If `phased`, the stages' weights take turns on the device: the worker encodes all its images,
    then denoises all, then decodes all, and never runs two of these at once. `in_flight` is how
    many forward passes may run at once; more than one keeps all stages of a pipelined group busy.
    """

    @property
    def phased(self) -> bool:
        """Whether encode, step and decode must run phase by phase over the backlog."""

    @property
    def in_flight(self) -> int:
        """How many threads may be inside `step`, each with its own samples."""

    @property
    def card(self) -> Card:
        """The model's properties; constant after warm-up."""

    def tokenizer_json(self) -> str | None:
        """The tokenizer that counts tokens for `card.max_prompt_tokens`, as a `tokenizer.json`.

        The `tokenizers` library can read it without torch. With `form = card.prompt`, a text has
        `len(Tokenizer.from_str(json).encode(form.of(text)).ids) - form.dropped` tokens, and is
        truncated exactly if that's more than `card.max_prompt_tokens`. None (as `card.prompt` then
        is) if the model prepares its text in another way. May be tens of MB.
        """

    def check(self) -> None:
        """Raise GroupLost if the pipeline's group of ranks is lost.

        Called often, even while idle. Does nothing for a pipeline of one process.
        """

    def batch_key(self, request: ImageRequest) -> Hashable:
        """Requests can share a forward pass if their keys are equal."""

    def rows(self, request: ImageRequest) -> int:
        """Rows of the forward batch that one sample takes: 2 under classifier-free guidance."""

    def tokens(self, request: ImageRequest) -> int:
        """Image tokens of one row; the worker limits a batch's rows x tokens."""

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditioning]:
        """Run the text encoders; each result is the same as if its request were encoded alone."""

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample at step 0, with latents drawn from the request's seed.

        Raises ImageFailed if the size isn't on the model's grid.
        """

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """Advance every sample by one step, in one forward pass; all share one batch key.

        The forward batch is padded to `bucket` samples if there are fewer, so that a sample's bits
        don't depend on the size of its batch. Raises OutOfMemory if the batch doesn't fit the
        device; no sample is changed then.
        """

    def decode(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """Decode finished samples to pixels: each float32 [3, height, width] in 0..1, on the CPU.

        Raises OutOfMemory if even one doesn't fit the device, and ImageFailed if one is NaN or was
        refused by a safety checker. Decode one at a time to find out which.
        """

    def preview(self, sample: Sample) -> torch.Tensor | None:
        """An estimate of a running sample's image, in `decode`'s format; None if there's none yet.

        Costs as much as a decode and doesn't change the sample. While `step` may run, pass a copy
        with its own `extra`. Raises OutOfMemory and ImageFailed like `decode`.
        """


class Follower(Protocol):
    """A rank above 0 of a group, which does its part of every forward pass of rank 0."""

    def run(self) -> None:
        """Follow until the leader says stop. Raises GroupLost if the group is lost first."""
