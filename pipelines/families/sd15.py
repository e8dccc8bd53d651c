"""Stable Diffusion 1 and 2: a UNet over 8x latents, prompted by one CLIP.

Equals `StableDiffusionPipeline(guidance_scale=g, negative_prompt=negative)` with any scheduler
class. A UNet distilled with guidance as an input (`time_cond_proj_dim`, as in LCM) gets the scale
there. The safety checker runs when decoding, image by image. Doesn't support clip_skip or IP
adapters.
"""

from collections.abc import Sequence
from typing import Any

import torch

from jobs.errors import ConfigurationError, ImageFailed
from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import REFUSED, Role
from pipelines.families.stepped import Stepped
from pipelines.families.unet import embedded_guidance, takes_guidance
from pipelines.schedule import first_latents, own_scheduler
from pipelines.seam import Card, Conditioning, PromptForm, Sample
from pipelines.text import TokenCounter


class StableDiffusion(Stepped):
    """A StableDiffusionPipeline run step by step."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        if max_sequence_length is not None:
            raise ConfigurationError("max_sequence_length isn't supported: CLIP's is fixed")
        self.pipe = pipe
        self.count = TokenCounter(pipe.tokenizer)
        self.card = Card(
            family="sd15",
            multiple=pipe.vae_scale_factor,
            guidance="embedded" if takes_guidance(pipe.unet) else "classifier-free",
            joins=True,
            max_prompt_tokens=pipe.tokenizer.model_max_length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=PromptForm(),
        )

    def guided(self, request: ImageRequest) -> bool:
        """Whether the request runs with classifier-free guidance."""
        return not takes_guidance(self.pipe.unet) and super().guided(request)

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """CLIP's prompt_embeds [1, 77, d]."""
        text = text or ""
        embeds, _ = self.pipe.encode_prompt(
            text, self.pipe._execution_device, 1, do_classifier_free_guidance=False
        )
        truncated = self.count(text) > self.pipe.tokenizer.model_max_length
        return Conditioning({"prompt_embeds": embeds}, truncated)

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """Latents [1, 4, height / 8, width / 8], as noisy as the scheduler's first step."""
        generator = batch.seeded(request)
        embeds = conditioning.tensors["prompt_embeds"]
        scheduler = own_scheduler(self.pipe.scheduler, request.steps, embeds.device)
        factor = self.pipe.vae_scale_factor
        channels = self.pipe.unet.config.in_channels
        shape = (1, channels, request.height // factor, request.width // factor)
        latents = first_latents(scheduler, shape, generator, embeds)
        return batch.new_sample(request, conditioning, latents, scheduler, generator)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One UNet forward over all rows, each at its own timestep."""
        rows = batch.padded(samples, bucket)
        guided = self.guided(samples[0].request)
        latents = batch.latents(rows, guided, scaled=True)
        noise = self.pipe.unet(
            latents,
            batch.timesteps(rows, guided),
            encoder_hidden_states=batch.embeddings(rows, "prompt_embeds", guided),
            timestep_cond=embedded_guidance(self.pipe, rows, latents),
            return_dict=False,
        )[0]
        batch.advance(samples, batch.predictions(noise, rows, guided), eta=0.0)

    def decode(self, sample: Sample) -> torch.Tensor:
        """The VAE's image. Raises ImageFailed if the safety checker refuses it."""
        pipe, vae = self.pipe, self.pipe.vae
        assert sample.latents is not None
        image = vae.decode(sample.latents / vae.config.scaling_factor, return_dict=False)[0]
        image, refused = pipe.run_safety_checker(image, image.device, sample.latents.dtype)
        if refused and refused[0]:
            raise ImageFailed(REFUSED)
        return batch.pixels(pipe, image)
