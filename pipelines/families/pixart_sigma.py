"""PixArt-Sigma: a diffusion transformer over 8x latents, prompted by T5 with a mask.

Equals `PixArtSigmaPipeline(guidance_scale=g, negative_prompt=negative or "",
use_resolution_binning=False)` with any scheduler class. Without resolution binning, images are
computed at the requested size instead of cropped to it. The transformer's learned variance is
dropped, as in the pipeline.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available

from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.stepped import Stepped
from pipelines.schedule import first_latents, own_scheduler
from pipelines.seam import Card, Conditioning, PromptForm, Sample
from pipelines.text import TokenCounter, sequence_length


class PixArtSigma(Stepped):
    """A PixArtSigmaPipeline run step by step."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = sequence_length(max_sequence_length, default=300, largest=512)
        self.count = TokenCounter(pipe.tokenizer, self._cleaned)
        self.card = Card(
            family="pixart_sigma",
            multiple=pipe.vae_scale_factor * pipe.transformer.config.patch_size,
            guidance="classifier-free",
            joins=True,
            max_prompt_tokens=self.length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=None if _cleans_markup() else PromptForm(lowered=True),
        )

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """T5's prompt_embeds [1, length, d] and prompt_mask [1, length] of the cleaned text."""
        text = text or ""
        embeds, mask, _, _ = self.pipe.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            clean_caption=True,
            max_sequence_length=self.length,
        )
        return Conditioning(
            {"prompt_embeds": embeds, "prompt_mask": mask},
            truncated=self.count(text) > self.length,
        )

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """Latents [1, 4, height / 8, width / 8], as noisy as the scheduler's first step."""
        generator = batch.seeded(request)
        embeds = conditioning.tensors["prompt_embeds"]
        scheduler = own_scheduler(self.pipe.scheduler, request.steps, embeds.device)
        factor = self.pipe.vae_scale_factor
        channels = self.pipe.transformer.config.in_channels
        shape = (1, channels, request.height // factor, request.width // factor)
        latents = first_latents(scheduler, shape, generator, embeds)
        return batch.new_sample(request, conditioning, latents, scheduler, generator)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One transformer forward over all rows, each at its own timestep."""
        rows = batch.padded(samples, bucket)
        guided = self.guided(samples[0].request)
        output = self.pipe.transformer(
            batch.latents(rows, guided, scaled=True),
            encoder_hidden_states=batch.embeddings(rows, "prompt_embeds", guided),
            encoder_attention_mask=batch.embeddings(rows, "prompt_mask", guided),
            timestep=batch.timesteps(rows, guided),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        noise = batch.without_variance(output, self.pipe.transformer.config)
        batch.advance(samples, batch.predictions(noise, rows, guided), eta=0.0)

    def decode(self, sample: Sample) -> torch.Tensor:
        """The VAE's image of the unscaled latents."""
        vae = self.pipe.vae
        assert sample.latents is not None
        latents = sample.latents.to(vae.dtype) / vae.config.scaling_factor
        return batch.pixels(self.pipe, vae.decode(latents, return_dict=False)[0])

    def _cleaned(self, text: str) -> str:
        cleaned: str = self.pipe._text_preprocessing(text, clean_caption=True)[0]
        return cleaned


def _cleans_markup() -> bool:
    """Whether bs4 and ftfy are installed, with which the pipeline does more than lowercase."""
    return bool(is_bs4_available() and is_ftfy_available())
