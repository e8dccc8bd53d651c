"""Chroma: Flux's transformer without a guidance input, prompted by T5 with a mask.

Equals `ChromaPipeline(guidance_scale=g, negative_prompt=negative or "")`. The mask covers a
prompt's padding except the first padding token. It reaches the attention as numbers, so diffusers
adds it to the scores: 1 between tokens that count and 0 elsewhere. We keep that. Prompts are padded
to the model's fixed length, so prompts of any length can share a forward pass. Images in a forward
batch share their position ids, so they must have the same size. Doesn't support IP adapters.
"""

from collections.abc import Sequence
from typing import Any

from jobs.request import ImageRequest
from pipelines import batch
from pipelines.families.family import Role
from pipelines.families.flux import Flux
from pipelines.families.stepped import Stepped
from pipelines.schedule import flow_sigmas
from pipelines.seam import Card, Conditioning, PromptForm, Sample
from pipelines.text import TokenCounter, sequence_length


class Chroma(Flux):
    """A ChromaPipeline run step by step; latents, schedule and decoding are Flux's."""

    def __init__(self, pipe: Any, max_sequence_length: int | None = None) -> None:
        self.pipe = pipe
        self.length = sequence_length(max_sequence_length, default=512, largest=512)
        self.count = TokenCounter(pipe.tokenizer)
        self.embedded_guidance = False
        self.card = Card(
            family="chroma",
            multiple=2 * pipe.vae_scale_factor,
            guidance="classifier-free",
            joins=True,
            max_prompt_tokens=self.length,
            scheduler=type(pipe.scheduler).__name__,
            prompt=PromptForm(),
        )

    def guided(self, request: ImageRequest) -> bool:
        """Whether the request runs with classifier-free guidance."""
        return Stepped.guided(self, request)

    def sigmas(self, steps: int) -> Any:
        """Evenly spaced for any scheduler, because the pipeline ignores `use_flow_sigmas`."""
        return flow_sigmas({}, steps)

    def encode(self, text: str | None, role: Role) -> Conditioning:
        """T5's prompt_embeds [1, length, d] and prompt_mask [1, length], both in its dtype."""
        text = text or ""
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=self.length
        )
        return Conditioning(
            {"prompt_embeds": embeds, "prompt_mask": mask},
            truncated=self.count(text) > self.length,
        )

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """One transformer forward over all rows, each at its own timestep."""
        rows = batch.padded(samples, bucket)
        guided = self.guided(samples[0].request)
        latents = batch.latents(rows, guided)
        embeds = batch.embeddings(rows, "prompt_embeds", guided)
        mask = self.pipe._prepare_attention_mask(
            len(latents),
            latents.shape[1],
            latents.dtype,
            batch.embeddings(rows, "prompt_mask", guided),
        )
        velocity = self.pipe.transformer(
            hidden_states=latents,
            timestep=batch.timesteps(rows, guided).to(latents.dtype) / 1000,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=samples[0].extra["image_ids"],
            attention_mask=mask,
            return_dict=False,
        )[0]
        batch.advance(samples, batch.predictions(velocity, rows, guided))
