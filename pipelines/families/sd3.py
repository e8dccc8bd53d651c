"""Stable Diffusion 3: a rectified-flow transformer with two CLIPs and, if present, T5.

Equals `StableDiffusion3Pipeline(guidance_scale=g, negative_prompt=negative)`. Prompts are padded
without a mask to a fixed length. Doesn't support skip-layer guidance or IP adapters.
"""

from collections.abc import Sequence
from typing import Any

import torch

from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.stepped import Stepped
from pipelines.schedule import own_scheduler, resolution_shift
from pipelines.seam import Card, Conditioning, PromptForm, Sample
from pipelines.text import TokenCounter, sequence_length


class StableDiffusion3(Stepped):
    """A StableDiffusion3Pipeline run step by step.

    `truncated` and the card refer to T5 if there is one, because it reads beyond the 77 tokens of
    the CLIPs. That the CLIPs stop there isn't reported.
    """

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = sequence_length(max_sequence_length, default=256, largest=512)
        has_t5 = pipe.text_encoder_3 is not None
        self.count = TokenCounter(pipe.tokenizer_3 if has_t5 else pipe.tokenizer)
        self.limit: int = self.length if has_t5 else pipe.tokenizer_max_length
        self.patch: int = pipe.transformer.config.patch_size
        self.card = Card(
            family="sd3",
            multiple=pipe.vae_scale_factor * self.patch,
            guidance="classifier-free",
            joins=True,
            max_prompt_tokens=self.limit,
            scheduler=type(pipe.scheduler).__name__,
            prompt=PromptForm(),
        )

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """CLIP's and T5's prompt_embeds [1, 77 + length, d], pooled_prompt_embeds [1, p]."""
        text = text or ""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            text, None, None, do_classifier_free_guidance=False, max_sequence_length=self.length
        )
        return Conditioning(
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
            truncated=self.count(text) > self.limit,
        )

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """Latents [1, channels, height / 8, width / 8]."""
        generator = batch.seeded(request)
        embeds = conditioning.tensors["prompt_embeds"]
        latents = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.config.in_channels,
            request.height,
            request.width,
            embeds.dtype,
            embeds.device,
            generator,
        )
        config = self.pipe.scheduler.config
        shift = resolution_shift(config, self.tokens(request), max_shift=1.16)
        options = {"mu": shift} if config.get("use_dynamic_shifting") else {}
        scheduler = own_scheduler(self.pipe.scheduler, request.steps, latents.device, **options)
        return batch.new_sample(request, conditioning, latents, scheduler, generator)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One transformer forward over all rows, each at its own timestep."""
        rows = batch.padded(samples, bucket)
        guided = self.guided(samples[0].request)
        velocity = self.pipe.transformer(
            hidden_states=batch.latents(rows, guided),
            timestep=batch.timesteps(rows, guided),
            encoder_hidden_states=batch.embeddings(rows, "prompt_embeds", guided),
            pooled_projections=batch.embeddings(rows, "pooled_prompt_embeds", guided),
            return_dict=False,
        )[0]
        batch.advance(samples, batch.predictions(velocity, rows, guided))

    def decode(self, sample: Sample) -> torch.Tensor:
        """The VAE's image of the unscaled latents."""
        vae = self.pipe.vae
        assert sample.latents is not None
        latents = sample.latents / vae.config.scaling_factor + vae.config.shift_factor
        return batch.pixels(self.pipe, vae.decode(latents, return_dict=False)[0])
