"""Flux: a rectified-flow transformer over packed 2x2 latent patches, with CLIP and T5 prompts.

Equals `FluxPipeline(guidance_scale=g)` if the transformer has embedded guidance (FLUX.1-dev), else
`FluxPipeline(true_cfg_scale=g, negative_prompt=negative or "")`, so guidance_scale works with both.
Images in a forward batch share their position ids, so they must have the same size. Prompts are
padded without a mask to the model's fixed length. Doesn't support IP adapters or LoRA scales.
"""

from collections.abc import Sequence
from typing import Any

import torch

from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.stepped import Stepped
from pipelines.schedule import flow_sigmas, own_scheduler, resolution_shift
from pipelines.seam import Card, Conditioning, PromptForm, Sample
from pipelines.text import TokenCounter, sequence_length


class Flux(Stepped):
    """A FluxPipeline run step by step.

    `truncated` and the card refer to T5, which carries the words. CLIP stops at 77 tokens, but only
    its pooled vector is used, so that isn't reported.
    """

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = sequence_length(max_sequence_length, default=512, largest=512)
        self.count = TokenCounter(pipe.tokenizer_2)
        self.embedded_guidance: bool = pipe.transformer.config.guidance_embeds
        self.card = Card(
            family="flux",
            multiple=2 * pipe.vae_scale_factor,
            guidance="embedded" if self.embedded_guidance else "classifier-free",
            joins=True,
            max_prompt_tokens=self.length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=PromptForm(),
        )

    def guided(self, request: ImageRequest) -> bool:
        """Whether the request runs with classifier-free guidance."""
        return not self.embedded_guidance and super().guided(request)

    def sigmas(self, steps: int) -> Any:
        """Noise levels [steps] that the pipeline passes to its scheduler; None for the default."""
        return flow_sigmas(self.pipe.scheduler.config, steps)

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """T5's prompt_embeds [1, length, d] and CLIP's pooled_prompt_embeds [1, p]."""
        text = text or ""
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=text, prompt_2=None, max_sequence_length=self.length
        )
        return Conditioning(
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
            truncated=self.count(text) > self.length,
        )

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """Packed latents [1, tokens, channels]."""
        generator = batch.seeded(request)
        embeds = conditioning.tensors["prompt_embeds"]
        latents, image_ids = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.config.in_channels // 4,
            request.height,
            request.width,
            embeds.dtype,
            embeds.device,
            generator,
        )
        config = self.pipe.scheduler.config
        scheduler = own_scheduler(
            self.pipe.scheduler,
            request.steps,
            latents.device,
            sigmas=self.sigmas(request.steps),
            mu=resolution_shift(config, latents.shape[1]),
        )
        scheduler.set_begin_index(0)
        return batch.new_sample(
            request, conditioning, latents, scheduler, generator, image_ids=image_ids
        )

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One transformer forward over all rows, each at its own timestep."""
        rows = batch.padded(samples, bucket)
        guided = self.guided(samples[0].request)
        latents = batch.latents(rows, guided)
        embeds = batch.embeddings(rows, "prompt_embeds", guided)
        velocity = self.pipe.transformer(
            hidden_states=latents,
            timestep=batch.timesteps(rows, guided).to(latents.dtype) / 1000,
            guidance=batch.scales(rows) if self.embedded_guidance else None,
            pooled_projections=batch.embeddings(rows, "pooled_prompt_embeds", guided),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=samples[0].extra["image_ids"],
            return_dict=False,
        )[0]
        batch.advance(samples, batch.predictions(velocity, rows, guided))

    def decode(self, sample: Sample) -> torch.Tensor:
        """The VAE's image of the unpacked, unscaled latents."""
        pipe, vae, request = self.pipe, self.pipe.vae, sample.request
        latents = pipe._unpack_latents(
            sample.latents, request.height, request.width, pipe.vae_scale_factor
        )
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return batch.pixels(pipe, vae.decode(latents, return_dict=False)[0])
