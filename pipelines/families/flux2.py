"""FLUX.2: a rectified-flow transformer over patched latents, prompted by a language model.

`Flux2` equals `Flux2Pipeline(guidance_scale=g)`: FLUX.2-dev, prompted by Mistral, with guidance as
an input of the transformer and no negative prompt. `Flux2Klein` equals
`Flux2KleinPipeline(guidance_scale=g, negative_prompt_embeds=...)`, prompted by Qwen3, with the
embeddings of the negative prompt, or of "" without one. Distilled checkpoints of either kind have
no guidance. Images in a forward batch share their position ids, so they must have the same size.
Doesn't edit images or rewrite prompts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input

from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.stepped import Stepped
from pipelines.schedule import flow_sigmas, own_scheduler
from pipelines.seam import Card, Conditioning, PromptForm, Sample
from pipelines.text import TokenCounter, chat_form, sequence_length

IMAGE_TOKEN = "[IMG]"
"""The text that Flux2Pipeline removes from prompts; in Mistral's vocabulary it means an image."""


class Flux2(Stepped):
    """A Flux2Pipeline run step by step."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = sequence_length(max_sequence_length, default=512, largest=512)
        self.count = TokenCounter(self._tokenizer(), self._chat)
        self.embedded_guidance: bool = pipe.transformer.config.guidance_embeds
        self.card = Card(
            family="flux2",
            multiple=2 * pipe.vae_scale_factor,
            guidance="embedded" if self.embedded_guidance else "none",
            joins=True,
            max_prompt_tokens=self.length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=self._form(),
        )

    def guided(self, request: ImageRequest) -> bool:
        """Always False: guidance is an input of the transformer, or the model has no guidance."""
        return False

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """Three hidden layers of the language model, joined: prompt_embeds [1, length, 3 d]."""
        text = text or ""
        embeds, _ = self.pipe.encode_prompt(text, max_sequence_length=self.length)
        return Conditioning({"prompt_embeds": embeds}, truncated=self._tokens(text) > self.length)

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
            guidance=batch.scales(rows) if self.embedded_guidance else None,
            encoder_hidden_states=embeds,
            txt_ids=self.pipe._prepare_text_ids(embeds[:1]).to(embeds.device),
            img_ids=samples[0].extra["image_ids"],
            return_dict=False,
        )[0]
        batch.advance(samples, batch.predictions(velocity, rows, guided))

    def decode(self, sample: Sample) -> torch.Tensor:
        """The VAE's image; the latents' mean and deviation are its batch norm's statistics."""
        pipe, vae = self.pipe, self.pipe.vae
        latents = self._unpacked(sample)
        variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
        deviation = torch.sqrt(variance).to(latents.device, latents.dtype)
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        latents = pipe._unpatchify_latents(latents * deviation + mean)
        return batch.pixels(pipe, vae.decode(latents, return_dict=False)[0])

    def _unpacked(self, sample: Sample) -> torch.Tensor:
        """Latents [1, channels, height / grid, width / grid]."""
        unpacked: torch.Tensor = self.pipe._unpack_latents_with_ids(
            sample.latents, sample.extra["image_ids"]
        )
        return unpacked

    def _tokenizer(self) -> Any:
        """The pipeline's tokenizer, which may be inside a processor."""
        return getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)

    def _tokens(self, text: str) -> int:
        """Tokens of a text within the chat, without those that the tokenizer adds itself."""
        return self.count(text) - self._added()

    def _added(self) -> int:
        return len(self._tokenizer()("").input_ids)

    def _form(self) -> PromptForm | None:
        form = chat_form(self._chat)
        return form and replace(form, dropped=self._added(), removed=IMAGE_TOKEN)

    def _chat(self, text: str) -> str:
        [messages] = format_input([text], self.pipe.system_message)
        chat: str = self.pipe.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False
        )
        return chat


class Flux2Klein(Flux2):
    """A Flux2KleinPipeline run step by step."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe, max_sequence_length)
        self.embedded_guidance = False
        guidance = "none" if pipe.config.is_distilled else "classifier-free"
        self.card = replace(self.card, family="flux2_klein", guidance=guidance)

    def guided(self, request: ImageRequest) -> bool:
        """Whether the request runs with classifier-free guidance."""
        return not self.pipe.config.is_distilled and Stepped.guided(self, request)

    def _unpacked(self, sample: Sample) -> torch.Tensor:
        grid, request = self.card.multiple, sample.request
        unpacked: torch.Tensor = self.pipe._unpack_latents_with_ids(
            sample.latents,
            sample.extra["image_ids"],
            request.height // grid,
            request.width // grid,
        )
        return unpacked

    def _added(self) -> int:
        return 0

    def _form(self) -> PromptForm | None:
        return chat_form(self._chat)

    def _chat(self, text: str) -> str:
        chat: str = self.pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return chat
