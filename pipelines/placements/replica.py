"""Replica: all of the model on one device. More workers on the same queue make more replicas.

Runs a family's verbs without gradients, keeps embeddings of prompts that come again, and says
OutOfMemory when the device is full. Knows no mathematics of any model.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from jobs.catalog import Model
from jobs.errors import ConfigurationError, ImageFailed
from jobs.request import ImageRequest
from pipelines.batch import NEGATIVE
from pipelines.cache import EmbeddingCache
from pipelines.checkpoint import Checkpoint
from pipelines.families import make_family
from pipelines.families.family import Family
from pipelines.memory import reports_out_of_memory
from pipelines.preview import finished_latents
from pipelines.seam import Card, Conditioning, Sample


class Replica:
    """A family on one device: the seam's Pipeline."""

    def __init__(self, family: Family, cache: EmbeddingCache | None = None) -> None:
        self.family = family
        self.cache = cache or EmbeddingCache()

    @property
    def card(self) -> Card:
        """What the model is."""
        return self.family.card

    def tokenizer_json(self) -> str | None:
        """The tokenizer that counts the prompts, as JSON."""
        return self.family.tokenizer_json()

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
        """Encode text by text, never as a batch: a batch would change the last bits."""
        return [self._encode(request) for request in requests]

    @reports_out_of_memory
    @torch.inference_mode()
    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """A sample at step 0. Raises ImageFailed for a size off the model's grid."""
        grid = self.card.multiple
        if request.width % grid or request.height % grid:
            raise ImageFailed(
                f"{request.width}x{request.height} is not a multiple of {grid} pixels each way"
            )
        return self.family.start(request, conditioning)

    @reports_out_of_memory
    @torch.inference_mode()
    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One forward pass over all samples."""
        self.family.step(samples, bucket)

    @reports_out_of_memory
    def decode(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """Pixels one image at a time, so that none depends on its neighbours.

        Raises ImageFailed when the decoder makes NaN of a sample's latents.
        """
        return [self._decode(sample) for sample in samples]

    @reports_out_of_memory
    def preview(self, sample: Sample) -> torch.Tensor | None:
        """The decoded guess at what the sample becomes; None before its first step."""
        with torch.inference_mode():
            latents = finished_latents(sample)
        return None if latents is None else self._decode(replace(sample, latents=latents))

    def _encode(self, request: ImageRequest) -> Conditioning:
        tensors: dict[str, torch.Tensor] = {}
        truncated = False
        for role, text in self.family.texts(request).items():
            made = self.cache.get(role, text, lambda r=role, t=text: self.family.encode(t, r))  # type: ignore[misc]
            prefix = NEGATIVE if role == "negative" else ""
            tensors.update({prefix + name: tensor for name, tensor in made.tensors.items()})
            truncated = truncated or made.truncated
        return Conditioning(tensors, truncated)

    def _decode(self, sample: Sample) -> torch.Tensor:
        with torch.inference_mode():
            pixels = self.family.decode(sample).float().cpu()
        if not torch.isfinite(pixels).all():
            raise ImageFailed("the decoder came to NaN or infinity")
        return pixels.clone()  # a plain tensor, which the caller may change in place


def load_replica(model: Model, checkpoint: Checkpoint, device: str) -> Replica:
    """Load everything onto `device`. Raises ModelUnavailable, ConfigurationError, OutOfMemory."""
    pipe = checkpoint.load(model)
    _choose_attention(pipe, model)
    move = reports_out_of_memory(pipe.to)
    return Replica(make_family(move(device), model.max_sequence_length))


def _choose_attention(pipe: Any, model: Model) -> None:
    if model.attention_backend is None:
        return
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    try:
        denoiser.set_attention_backend(model.attention_backend)
    except (AttributeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigurationError(
            f"attention_backend {model.attention_backend!r}: {error}"
        ) from error
