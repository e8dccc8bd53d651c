"""Sana: a linear-attention transformer over 32x latents, prompted by Gemma 2 with a mask.

Equals `SanaPipeline(guidance_scale=g, negative_prompt=negative or "",
use_resolution_binning=False)` with any scheduler class. The pipeline's default
`complex_human_instruction` precedes the prompt, but not the negative prompt. Without resolution
binning, images are computed at the requested size.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.stepped import Stepped
from pipelines.schedule import own_scheduler
from pipelines.seam import Card, Conditioning, PromptForm, Sample
from pipelines.text import TokenCounter, sequence_length

GRID = 32
"""The pipeline takes sizes that are multiples of this many pixels."""


class Sana(Stepped):
    """A SanaPipeline run step by step."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = sequence_length(max_sequence_length, default=300, largest=512)
        form = PromptForm(lowered=True)
        self.count = TokenCounter(pipe.tokenizer, form.of)
        call = inspect.signature(type(pipe).__call__)
        self.instruction: list[str] = call.parameters["complex_human_instruction"].default
        self.card = Card(
            family="sana",
            multiple=GRID,
            guidance="classifier-free",
            joins=True,
            max_prompt_tokens=self.length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=form,
        )

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """Gemma's prompt_embeds [1, length, d] and prompt_mask [1, length]."""
        text = text or ""
        embeds, mask, _, _ = self.pipe.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length,
            complex_human_instruction=self.instruction if role == "positive" else None,
        )
        return Conditioning(
            {"prompt_embeds": embeds, "prompt_mask": mask},
            truncated=self.count(text) > self.length,
        )

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """Latents float32 [1, channels, height / 32, width / 32] for any dtype of the model."""
        generator = batch.seeded(request)
        device = conditioning.tensors["prompt_embeds"].device
        latents = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.config.in_channels,
            request.height,
            request.width,
            torch.float32,
            device,
            generator,
        )
        scheduler = own_scheduler(self.pipe.scheduler, request.steps, device)
        return batch.new_sample(request, conditioning, latents, scheduler, generator)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One transformer forward over all rows, each at its own timestep."""
        rows = batch.padded(samples, bucket)
        guided = self.guided(samples[0].request)
        transformer = self.pipe.transformer
        output = transformer(
            batch.latents(rows, guided).to(transformer.dtype),
            encoder_hidden_states=batch.embeddings(rows, "prompt_embeds", guided).to(
                transformer.dtype
            ),
            encoder_attention_mask=batch.embeddings(rows, "prompt_mask", guided),
            timestep=batch.timesteps(rows, guided) * transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        noise = batch.without_variance(output.float(), transformer.config)
        batch.advance(samples, batch.predictions(noise, rows, guided), eta=0.0)

    def decode(self, sample: Sample) -> torch.Tensor:
        """The autoencoder's image of the unscaled latents."""
        vae = self.pipe.vae
        assert sample.latents is not None
        latents = sample.latents.to(vae.dtype) / vae.config.scaling_factor
        return batch.pixels(self.pipe, vae.decode(latents, return_dict=False)[0])
