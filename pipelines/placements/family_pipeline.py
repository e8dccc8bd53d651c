"""The seam's Pipeline around a family, whose components a placement has put on devices.

Runs a family's verbs without gradients, caches embeddings of repeated prompts, and raises
OutOfMemory when a device is full. Independent of the kind of model and of where its weights are.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import structlog
import torch

from jobs.errors import ImageFailed, OutOfMemory
from jobs.request import ImageRequest
from pipelines.batch import NEGATIVE
from pipelines.cache import EmbeddingCache
from pipelines.device import use_device
from pipelines.fair_lock import FairLock
from pipelines.families.family import Family
from pipelines.out_of_memory import reports_out_of_memory
from pipelines.preview import finished_latents
from pipelines.seam import Card, Conditioning, Sample
from pipelines.tiling import can_tile, tiled

T = TypeVar("T")

log = structlog.get_logger(__name__)


class FamilyPipeline:
    """The seam's Pipeline around a family: the part that all placements share.

    `device` becomes the current device of each thread that calls a verb; None leaves it unchanged.
    """

    phased = False
    in_flight = 1

    def __init__(
        self,
        family: Family,
        cache: EmbeddingCache | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.family, self.device = family, device
        self._turn: AbstractContextManager[Any] = nullcontext()
        self.cache = cache or EmbeddingCache()

    def run_one_at_a_time(self) -> None:
        """Let only one thread at a time run the models: text encoders, denoiser, autoencoder.

        Attention that sets process-wide flags needs this. Call it before the first verb.
        """
        self._turn = FairLock()

    @property
    def card(self) -> Card:
        """What the model is."""
        return self.family.card

    def tokenizer_json(self) -> str | None:
        """The tokenizer that counts the prompts, as JSON."""
        return self.family.tokenizer_json()

    def check(self) -> None:
        """Do nothing: a single process has no ranks to lose."""

    def batch_key(self, request: ImageRequest) -> Hashable:
        """What requests must share to run in one forward pass."""
        return self.family.batch_key(request)

    def rows(self, request: ImageRequest) -> int:
        """Rows of the forward batch that one sample takes."""
        return self.family.rows(request)

    def tokens(self, request: ImageRequest) -> int:
        """Image tokens of one row."""
        return self.family.tokens(request)

    @reports_out_of_memory
    @torch.inference_mode()
    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditioning]:
        """Encode texts one at a time, because a batch would change the last bits."""
        use_device(self.device)
        with self._turn:
            return [self._encode(request) for request in requests]

    @reports_out_of_memory
    @torch.inference_mode()
    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample at step 0. Raises ImageFailed for a size off the model's grid."""
        use_device(self.device)
        grid = self.card.multiple
        if request.width % grid or request.height % grid:
            raise ImageFailed(
                f"{request.width}x{request.height} is not a multiple of {grid} pixels each way"
            )
        return self.family.start(request, conditioning)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One forward pass over all samples."""
        decodes_too = not self.card.joins
        if decodes_too and max(len(samples), bucket) == 1:
            self._retry_in_tiles(samples[0], lambda: self._step(samples, bucket))
        else:
            self._step(samples, bucket)

    def decode(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """Decode images one at a time, so that no image's bits depend on the others.

        An image that doesn't fit is decoded in tiles and gets `extra["tiled"]`, because tiling
        changes its bits. Raises ImageFailed if the decoder returns NaN.
        """
        return [self._retry_in_tiles(s, partial(self._decode, s)) for s in samples]

    def preview(self, sample: Sample) -> torch.Tensor | None:
        """The decoded guess at the finished image; None before the first step."""
        with torch.inference_mode():
            latents = finished_latents(sample)
        if latents is None:
            return None
        guess = replace(sample, latents=latents, extra=dict(sample.extra))
        return self._retry_in_tiles(guess, lambda: self._decode(guess))

    def _retry_in_tiles(self, sample: Sample, attempt: Callable[[], T]) -> T:
        """If the attempt runs out of memory, retry it with the autoencoder in tiles.

        Raises OutOfMemory if that doesn't fit either.
        """
        try:
            return attempt()
        except OutOfMemory as error:
            vae = getattr(self.family.pipe, "vae", None)  # the attempt may have loaded it
            if not can_tile(vae):
                raise
            reason = str(error)
        size = f"{sample.request.width}x{sample.request.height}"
        log.warning("decoding in tiles", model=sample.request.model, size=size, reason=reason)
        with tiled(vae):
            result = attempt()
        sample.extra["tiled"] = True
        return result

    @reports_out_of_memory
    @torch.inference_mode()
    def _step(self, samples: Sequence[Sample], bucket: int) -> None:
        use_device(self.device)
        with self._turn:
            self.family.step(samples, bucket)

    def _encode(self, request: ImageRequest) -> Conditioning:
        tensors: dict[str, torch.Tensor] = {}
        cut: list[str] = []
        for role, text in self.family.texts(request).items():
            encoded = self.cache.get(role, text, lambda r=role, t=text: self.family.encode(t, r))  # type: ignore[misc]
            prefix = NEGATIVE if role == "negative" else ""
            tensors.update({prefix + name: tensor for name, tensor in encoded.tensors.items()})
            if encoded.truncated:
                cut.append("negative prompt" if role == "negative" else "prompt")
        return Conditioning(tensors, truncated=bool(cut), cut=tuple(cut))

    @reports_out_of_memory
    def _decode(self, sample: Sample) -> torch.Tensor:
        use_device(self.device)
        with self._turn, torch.inference_mode():
            pixels = self.family.decode(sample).float().cpu()
        if not torch.isfinite(pixels).all():
            raise ImageFailed("the decoder returned NaN or infinity")
        return pixels.clone()  # a plain tensor, which the caller may change in place
