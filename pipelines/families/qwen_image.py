"""Qwen-Image: a rectified-flow transformer over packed 2x2 latent patches, prompted by Qwen2.5-VL.

Equals `QwenImagePipeline(true_cfg_scale=g, negative_prompt=negative or "")`, or
`QwenImagePipeline(guidance_scale=g)` if the transformer has embedded guidance. Prompts have
different lengths: a forward batch pads them to its longest, with a mask. That padded length would
make an image's last bits depend on the rest of the batch, so reproducible requests are padded to a
multiple of `RUNG`, share a batch only with requests of the same padded length, and always have a
mask.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.stepped import Stepped
from pipelines.schedule import flow_sigmas, own_scheduler, resolution_shift
from pipelines.seam import Card, Conditioning, PromptForm, Sample
from pipelines.text import TokenCounter, chat_form, sequence_length

RUNG = 64
"""Reproducible prompts are padded to a multiple of this many tokens."""


class QwenImage(Stepped):
    """A QwenImagePipeline run step by step."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = sequence_length(max_sequence_length, default=512, largest=1024)
        self.count = TokenCounter(pipe.tokenizer, pipe.prompt_template_encode.format)
        self.embedded_guidance: bool = pipe.transformer.config.guidance_embeds
        self.card = Card(
            family="qwen_image",
            multiple=2 * pipe.vae_scale_factor,
            guidance="embedded" if self.embedded_guidance else "classifier-free",
            joins=True,
            max_prompt_tokens=self.length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=self._form(),
        )

    def guided(self, request: ImageRequest) -> bool:
        """Whether the request runs with classifier-free guidance."""
        return not self.embedded_guidance and super().guided(request)

    def batch_key(self, request: ImageRequest) -> Hashable:
        """Same size and rows; for reproducible requests also the same padded prompt length."""
        rung = self._rung(request) if request.reproducible else 0
        return super().batch_key(request), rung

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """Qwen2.5-VL's last hidden states after the template: prompt_embeds [1, tokens, d]."""
        text = text or ""
        embeds, _ = self.pipe.encode_prompt(text, max_sequence_length=self.length)
        return Conditioning({"prompt_embeds": embeds}, truncated=self._tokens(text) > self.length)

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """Packed latents [1, tokens, channels]."""
        generator = batch.seeded(request)
        embeds = conditioning.tensors["prompt_embeds"]
        latents = self.pipe.prepare_latents(
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
            sigmas=flow_sigmas({}, request.steps),
            mu=resolution_shift(self.pipe.scheduler.config, latents.shape[1]),
        )
        scheduler.set_begin_index(0)
        return batch.new_sample(request, conditioning, latents, scheduler, generator)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One transformer forward over all rows, each at its own timestep."""
        rows = batch.padded(samples, bucket)
        first = samples[0].request
        guided = self.guided(first)
        latents = batch.latents(rows, guided)
        embeds, mask = _padded_prompts(rows, guided, self._rung(first) if first.reproducible else 0)
        grid = self.card.multiple
        shape = (1, first.height // grid, first.width // grid)
        velocity = self.pipe.transformer(
            hidden_states=latents,
            timestep=batch.timesteps(rows, guided).to(latents.dtype) / 1000,
            guidance=batch.scales(rows) if self.embedded_guidance else None,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[shape]] * len(latents),
            return_dict=False,
        )[0]
        predicted = batch.predictions(velocity, rows, guided)
        if guided:
            predicted = _rescaled(predicted, velocity)
        batch.advance(samples, predicted)

    def decode(self, sample: Sample) -> torch.Tensor:
        """The video VAE's single frame of the unpacked, unnormalised latents."""
        pipe, vae, request = self.pipe, self.pipe.vae, sample.request
        latents = pipe._unpack_latents(
            sample.latents, request.height, request.width, pipe.vae_scale_factor
        ).to(vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).to(latents).view(1, -1, 1, 1, 1)
        # Divided by the inverse, as in the pipeline: in half precision that rounds differently.
        inverse = (1.0 / torch.tensor(vae.config.latents_std)).to(latents).view(1, -1, 1, 1, 1)
        image = vae.decode(latents / inverse + mean, return_dict=False)[0][:, :, 0]
        return batch.pixels(pipe, image)

    def _form(self) -> PromptForm | None:
        """The template, whose first tokens the pipeline drops after encoding."""
        form = chat_form(self.pipe.prompt_template_encode.format)
        return form and replace(form, dropped=self.pipe.prompt_template_encode_start_idx)

    def _tokens(self, text: str) -> int:
        """Tokens of a text, without the template's first tokens that are dropped."""
        start: int = self.pipe.prompt_template_encode_start_idx
        return self.count(text) - start

    def _rung(self, request: ImageRequest) -> int:
        """The padded length of a reproducible request's prompts."""
        texts = self.texts(request).values()
        longest = max(min(self._tokens(text or ""), self.length) for text in texts)
        return -(-longest // RUNG) * RUNG


def _padded_prompts(
    rows: Sequence[Sample], guided: bool, rung: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts [rows, longest, d] and mask [rows, longest], or None if nothing is padded.

    With a `rung`, prompts are padded to that length and the mask is never None.
    """
    names = ("prompt_embeds", batch.NEGATIVE + "prompt_embeds")[: 2 if guided else 1]
    prompts = [s.conditioning.tensors[name] for name in names for s in rows]
    lengths = torch.tensor([p.shape[1] for p in prompts], device=prompts[0].device)
    longest = rung or int(lengths.max())
    embeds = torch.cat([pad(p, (0, 0, 0, longest - p.shape[1])) for p in prompts])
    if not rung and bool((lengths == longest).all()):
        return embeds, None
    return embeds, torch.arange(longest, device=lengths.device) < lengths[:, None]


def _rescaled(predicted: Sequence[torch.Tensor], velocity: torch.Tensor) -> list[torch.Tensor]:
    """Guided predictions, each token rescaled to the norm of its positive prediction."""
    positive = velocity.chunk(2)[0].chunk(len(predicted))
    return [
        p * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(p, dim=-1, keepdim=True))
        for p, c in zip(predicted, positive, strict=True)
    ]
