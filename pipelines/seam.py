"""The seam between the worker and the models: one protocol, two values, one rule.

A family (the mathematics of one kind of model) and a placement (where its weights live) together
make a `Pipeline`. The worker calls these four and knows nothing else of models:

    encode(requests)  -> conditionings    text encoders
    start(request, conditioning) -> Sample    seeded latents and a schedule of its own
    step(samples, bucket) -> None         ONE forward pass over samples at different steps
    decode(samples)   -> pixels           VAE

Knows no Redis and no HTTP. The worker calls `encode`, `step` and `decode` each from a thread of its
own; only `step` may be called by several at once, by `in_flight` of them, on samples that differ.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from jobs.request import ImageRequest

ROUND = 64
"""Images of one round at most: they are held, and their embeddings kept, all at once."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the text encoders made of one prompt: tensors by name, one row each (batch dim 1)."""

    tensors: dict[str, torch.Tensor]
    truncated: bool = False

    @property
    def size(self) -> int:
        """Bytes held by the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(slots=True)
class Sample:
    """An image request in flight.

    `latents` is the family's own shape with batch dimension 1; None under a family that keeps
    none between steps. `step` counts finished denoising steps, 0..`steps`. `error` is set by
    `step` when this sample alone went wrong (NaN latents, a verdict of a safety checker): the
    worker then drops it and its neighbours go on. `cancelled` is set by the worker while a long
    `step` runs, and a family whose step is a whole call leaves early when all are.
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
        """Whether the denoising is finished and `decode` may be called."""
        return self.step >= self.steps


@dataclass(frozen=True, slots=True)
class PromptForm:
    """What becomes of a prompt before its tokens are counted against `Card.max_prompt_tokens`.

    The tokenizer reads `before` + prompt + `after`, the prompt in lower case and without white
    space at its ends where `lowered`, and without `removed` wherever that occurs in it; `dropped`
    of the tokens do not count. An absent negative prompt is "".
    """

    before: str = ""
    after: str = ""
    lowered: bool = False
    dropped: int = 0
    removed: str = ""

    def of(self, text: str) -> str:
        """What the tokenizer reads."""
        if self.removed:
            text = text.replace(self.removed, "")
        return self.before + (text.lower().strip() if self.lowered else text) + self.after


@dataclass(frozen=True, slots=True)
class Card:
    """What a loaded model turned out to be; the worker publishes it for the service to check by.

    `multiple` is the grid of widths and heights in pixels. `guidance` is "embedded",
    "classifier-free", "fixed" (classifier-free at a scale that the pipeline sets) or "none";
    classifier-free guidance runs, and negative prompts count, at a `guidance_scale` above
    `guides_above`. `joins` says whether a sample may join others between steps.
    `max_prompt_tokens` is where the text encoder cuts, None when unknown. `scheduler` is the
    scheduler's class name, for the recipe. `prompt` says how a prompt's tokens are counted with
    `Pipeline.tokenizer_json`; None where they cannot be counted from outside. `sizes` are the
    widths and heights that it has been seen to make, where it turns others into sizes of its own;
    None where it makes what it is asked for.
    """

    family: str
    multiple: int
    guidance: str
    joins: bool
    max_prompt_tokens: int | None
    scheduler: str
    prompt: PromptForm | None = None
    guides_above: float = 1.0
    sizes: tuple[tuple[int, int], ...] | None = None


class Pipeline(Protocol):
    """A family under a placement.

    `phased` says that the stages' weights take turns on the device: the worker then encodes all
    that it holds, then denoises all, then decodes all, and never runs two verbs at once.
    `in_flight` is how many forward passes may run at once; more than one keeps every stage of a
    pipelined group busy.
    """

    @property
    def phased(self) -> bool:
        """Whether encode, step and decode must run phase by phase over the backlog."""

    @property
    def in_flight(self) -> int:
        """How many threads may be inside `step`, each with samples of its own."""

    @property
    def card(self) -> Card:
        """What the model is; constant after warm-up."""

    def tokenizer_json(self) -> str | None:
        """The tokenizer that `card.max_prompt_tokens` counts by, as a `tokenizer.json`.

        The `tokenizers` library reads it, without torch. With `form = card.prompt`, a text has
        `len(Tokenizer.from_str(json).encode(form.of(text)).ids) - form.dropped` tokens, and is
        truncated exactly when they are more than `card.max_prompt_tokens`. None, and then no
        `card.prompt` either, where the model prepares its text otherwise. May be tens of MB.
        """

    def check(self) -> None:
        """Raise GroupLost when the pipeline's group of ranks is lost; asked often, also while idle.

        A pipeline of one process has none to lose.
        """

    def batch_key(self, request: ImageRequest) -> Hashable:
        """What requests must share to run in one forward pass."""

    def rows(self, request: ImageRequest) -> int:
        """Rows of the forward batch that one sample takes: 2 under classifier-free guidance."""

    def tokens(self, request: ImageRequest) -> int:
        """Image tokens of one row; rows x tokens is what admission budgets by."""

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditioning]:
        """Run the text encoders; each result equals that of encoding its request alone."""

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample at step 0, its latents drawn from the request's seed.

        Raises ImageFailed when the size is not on the model's grid.
        """

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """Advance every sample by one step, in one forward pass; all share one batch key.

        The forward batch is padded to `bucket` samples when that is larger than their number, so
        that a sample's bits do not depend on how many ran beside it. Raises OutOfMemory, having
        changed no sample, when the batch does not fit the device.
        """

    def decode(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """Finished samples to pixels: each float32 [3, height, width] in 0..1, on the CPU.

        Raises OutOfMemory when even one does not fit the device, and ImageFailed when one came to
        NaN or was refused by a safety checker: decode one at a time to know which.
        """

    def preview(self, sample: Sample) -> torch.Tensor | None:
        """What a running sample is about to become, as `decode` gives it; None if untold.

        Costs a decode and leaves the sample as it was; while `step` may run, give it a copy with an
        `extra` of its own. Raises OutOfMemory, and ImageFailed as `decode` does.
        """
