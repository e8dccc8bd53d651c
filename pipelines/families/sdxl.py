"""Stable Diffusion XL: a UNet over 8x latents, conditioned on two CLIPs and the image's size.

Equals `StableDiffusionXLPipeline(guidance_scale=g, negative_prompt=negative)` with any scheduler
class. Without a negative prompt, the negative embeddings are zeros if the checkpoint says so. A
half-precision VAE that overflows (`force_upcast`) is kept in float32. Doesn't support refiners,
clip_skip or IP adapters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from jobs.errors import ConfigurationError
from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.stepped import Stepped
from pipelines.families.unet import embedded_guidance, takes_guidance
from pipelines.schedule import first_latents, own_scheduler
from pipelines.seam import Card, Conditioning, PromptForm, Sample
from pipelines.text import TokenCounter


class StableDiffusionXL(Stepped):
    """A StableDiffusionXLPipeline run step by step."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        if max_sequence_length is not None:
            raise ConfigurationError("max_sequence_length isn't supported: CLIP's is fixed")
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)
        self.pipe = pipe
        self.count = TokenCounter(pipe.tokenizer_2)
        self.card = Card(
            family="sdxl",
            multiple=pipe.vae_scale_factor,
            guidance="embedded" if takes_guidance(pipe.unet) else "classifier-free",
            joins=True,
            max_prompt_tokens=pipe.tokenizer_2.model_max_length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=PromptForm(),
        )

    def guided(self, request: ImageRequest) -> bool:
        """Whether the request runs with classifier-free guidance."""
        return not takes_guidance(self.pipe.unet) and super().guided(request)

    def texts(self, request: ImageRequest) -> Mapping[Role, str | None]:
        """The prompt and the negative prompt, where None means zeros instead of an empty text."""
        texts: dict[Role, str | None] = {"positive": request.prompt}
        if self.guided(request):
            texts["negative"] = request.negative_prompt
        return texts

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """Both CLIPs' prompt_embeds [1, 77, d], the second's pooled_prompt_embeds [1, p]."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            text or "", do_classifier_free_guidance=False
        )
        if text is None and self.pipe.config.force_zeros_for_empty_prompt:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        return Conditioning(
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
            truncated=self.count(text or "") > self.pipe.tokenizer_2.model_max_length,
        )

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """Latents [1, 4, height / 8, width / 8], as noisy as the scheduler's first step."""
        generator = batch.seeded(request)
        embeds = conditioning.tensors["prompt_embeds"]
        scheduler = own_scheduler(self.pipe.scheduler, request.steps, embeds.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        factor = self.pipe.vae_scale_factor
        channels = self.pipe.unet.config.in_channels
        shape = (1, channels, request.height // factor, request.width // factor)
        latents = first_latents(scheduler, shape, generator, embeds)
        size = (request.height, request.width)
        time_ids = self.pipe._get_add_time_ids(
            size,
            (0, 0),
            size,
            dtype=embeds.dtype,
            text_encoder_projection_dim=conditioning.tensors["pooled_prompt_embeds"].shape[-1],
        ).to(embeds.device)
        return batch.new_sample(
            request, conditioning, latents, scheduler, generator, time_ids=time_ids
        )

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One UNet forward over all rows, each at its own timestep."""
        rows = batch.padded(samples, bucket)
        guided = self.guided(samples[0].request)
        latents = batch.latents(rows, guided, scaled=True)
        pooled = batch.embeddings(rows, "pooled_prompt_embeds", guided)
        noise = self.pipe.unet(
            latents,
            batch.timesteps(rows, guided),
            encoder_hidden_states=batch.embeddings(rows, "prompt_embeds", guided),
            timestep_cond=embedded_guidance(self.pipe, rows, latents),
            added_cond_kwargs={
                "text_embeds": pooled,
                "time_ids": samples[0].extra["time_ids"].repeat(len(latents), 1),
            },
            return_dict=False,
        )[0]
        batch.advance(samples, batch.predictions(noise, rows, guided), eta=0.0)

    def decode(self, sample: Sample) -> torch.Tensor:
        """The VAE's image, with a watermark if the pipeline has one."""
        pipe, vae = self.pipe, self.pipe.vae
        assert sample.latents is not None
        image = vae.decode(self._unscaled(sample.latents.to(vae.dtype)), return_dict=False)[0]
        if pipe.watermark is not None:
            image = pipe.watermark.apply_watermark(image)
        return batch.pixels(pipe, image)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents for the VAE; some checkpoints have a mean and deviation per channel."""
        config = self.pipe.vae.config
        scaling = float(config.scaling_factor)
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return latents / scaling
        mean = torch.tensor(config.latents_mean).to(latents).view(1, -1, 1, 1)
        deviation = torch.tensor(config.latents_std).to(latents).view(1, -1, 1, 1)
        return latents * deviation / scaling + mean
