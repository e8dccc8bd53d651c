"""Z-Image: a single-stream rectified-flow transformer, prompted by Qwen3.

Equals `ZImagePipeline(guidance_scale=g, negative_prompt=negative)`: any guidance above 0 is
classifier-free, with the formula positive + g (positive - negative). The transformer takes lists,
so images of different sizes and prompts of different lengths can share a forward pass, padded
inside it with a mask. That padding would make an image's last bits depend on the rest of the batch,
so reproducible requests share a batch only with requests of the same size and padded prompt
lengths.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.stepped import Stepped
from pipelines.schedule import own_scheduler, resolution_shift
from pipelines.seam import Card, Conditioning, Sample
from pipelines.text import TokenCounter, chat_form, sequence_length


class ZImage(Stepped):
    """A ZImagePipeline run step by step."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = sequence_length(max_sequence_length, default=512, largest=1024)
        self.count = TokenCounter(pipe.tokenizer, self._chat)
        self.card = Card(
            family="z_image",
            multiple=2 * pipe.vae_scale_factor,
            guidance="classifier-free",
            joins=True,
            max_prompt_tokens=self.length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=chat_form(self._chat),
            guides_above=0.0,
        )

    def guided(self, request: ImageRequest) -> bool:
        """Whether the request runs with classifier-free guidance."""
        return request.guidance_scale > self.card.guides_above

    def batch_key(self, request: ImageRequest) -> Hashable:
        """Same rows; for reproducible requests also the same size and padded prompt lengths."""
        if not request.reproducible:
            return self.guided(request)
        texts = self.texts(request).values()
        lengths = tuple(min(self.count(text or ""), self.length) for text in texts)
        padded = tuple(-(-length // SEQ_MULTI_OF) for length in lengths)
        return super().batch_key(request), padded

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """Qwen3's second-to-last hidden states: prompt_embeds [1, tokens, d]."""
        text = text or ""
        # A fresh list, because the pipeline writes the chat's text into it.
        [embeds], _ = self.pipe.encode_prompt(
            [text], do_classifier_free_guidance=False, max_sequence_length=self.length
        )
        return Conditioning(
            {"prompt_embeds": embeds[None]}, truncated=self.count(text) > self.length
        )

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """Latents float32 [1, channels, height / 8, width / 8] for any dtype of the model."""
        generator = batch.seeded(request)
        latents = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.in_channels,
            request.height,
            request.width,
            torch.float32,
            conditioning.tensors["prompt_embeds"].device,
            generator,
        )
        scheduler = own_scheduler(
            self.pipe.scheduler,
            request.steps,
            latents.device,
            sigmas=get_default_z_image_sigmas(request.steps),
            mu=resolution_shift(self.pipe.scheduler.config, self.tokens(request)),
        )
        scheduler.set_begin_index(0)
        return batch.new_sample(request, conditioning, latents, scheduler, generator)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One transformer forward over lists of rows, each at its own timestep and size."""
        rows = batch.padded(samples, bucket)
        guided = self.guided(samples[0].request)
        names = ("prompt_embeds", batch.NEGATIVE + "prompt_embeds")[: 2 if guided else 1]
        images = [s.latents for s in rows if s.latents is not None] * len(names)
        dtype = self.pipe.transformer.dtype
        output = self.pipe.transformer(
            [image[0].unsqueeze(1).to(dtype) for image in images],
            (1000 - batch.timesteps(rows, guided)) / 1000,
            [s.conditioning.tensors[name][0] for name in names for s in rows],
            return_dict=False,
        )[0]
        velocity = [-row.float().squeeze(1)[None] for row in output]
        batch.advance(samples, _guided(velocity, rows) if guided else velocity)

    def decode(self, sample: Sample) -> torch.Tensor:
        """The VAE's image of the unscaled latents."""
        vae = self.pipe.vae
        assert sample.latents is not None
        latents = sample.latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return batch.pixels(self.pipe, vae.decode(latents, return_dict=False)[0])

    def _chat(self, text: str) -> str:
        chat: str = self.pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        return chat


def _guided(velocity: Sequence[torch.Tensor], rows: Sequence[Sample]) -> list[torch.Tensor]:
    positive, negative = velocity[: len(rows)], velocity[len(rows) :]
    return [
        p + s.request.guidance_scale * (p - n)
        for s, p, n in zip(rows, positive, negative, strict=True)
    ]
