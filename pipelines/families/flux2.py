"""FLUX.2 Klein: a rectified-flow transformer over patched latents, prompted by Qwen3.

Equals `Flux2KleinPipeline(guidance_scale=g)`; a negative prompt is what that pipeline takes as
`negative_prompt_embeds`, and "" when there is none. A distilled checkpoint (`is_distilled`) has no
guidance. Position ids are shared over a forward batch, so only images of one size go together.
Knows nothing of editing images, and nothing of FLUX.2-dev, which `whole_call` serves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.stepped import Stepped
from pipelines.schedule import flow_sigmas, own_scheduler
from pipelines.seam import Card, Conditioning, Sample
from pipelines.text import TokenCounter, chat_form, sequence_length


class Flux2Klein(Stepped):
    """A Flux2KleinPipeline, stepped."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = sequence_length(max_sequence_length, default=512, largest=512)
        self.count = TokenCounter(pipe.tokenizer, self._chat)
        self.card = Card(
            family="flux2_klein",
            multiple=2 * pipe.vae_scale_factor,
            guidance="none" if pipe.config.is_distilled else "classifier-free",
            joins=True,
            max_prompt_tokens=self.length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=chat_form(self._chat),
        )

    def guided(self, request: ImageRequest) -> bool:
        """Whether the request runs with classifier-free guidance."""
        return not self.pipe.config.is_distilled and super().guided(request)

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """Three of Qwen3's hidden layers side by side: prompt_embeds [1, length, 3 d]."""
        text = text or ""
        embeds, _ = self.pipe.encode_prompt(text, max_sequence_length=self.length)
        return Conditioning({"prompt_embeds": embeds}, truncated=self.count(text) > self.length)

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
        scheduler = own_scheduler(
            self.pipe.scheduler,
            request.steps,
            latents.device,
            sigmas=flow_sigmas(self.pipe.scheduler.config, request.steps),
            mu=compute_empirical_mu(latents.shape[1], request.steps),
        )
        if hasattr(scheduler, "set_begin_index"):
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
            hidden_states=latents.to(self.pipe.transformer.dtype),
            timestep=batch.timesteps(rows, guided).to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=self.pipe._prepare_text_ids(embeds[:1]).to(embeds.device),
            img_ids=samples[0].extra["image_ids"],
            return_dict=False,
        )[0]
        batch.advance(samples, batch.predictions(velocity, rows, guided))

    def decode(self, sample: Sample) -> torch.Tensor:
        """The VAE's image; its batch norm's statistics are the latents' mean and deviation."""
        pipe, vae = self.pipe, self.pipe.vae
        grid = self.card.multiple
        latents = pipe._unpack_latents_with_ids(
            sample.latents,
            sample.extra["image_ids"],
            sample.request.height // grid,
            sample.request.width // grid,
        )
        variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
        deviation = torch.sqrt(variance).to(latents.device, latents.dtype)
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        latents = pipe._unpatchify_latents(latents * deviation + mean)
        return batch.pixels(pipe, vae.decode(latents, return_dict=False)[0])

    def _chat(self, text: str) -> str:
        chat: str = self.pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return chat
