"""A Pipeline without a model, for tests of the queue and the workers.

It's deterministic: the picture depends only on the seed and the prompt, not on the batch. Words in
a prompt make it fail like models do:

    [raise]     `step` raises RuntimeError
    [nan]       the sample gets an error at its last step
    [refuse]    `start` raises ImageFailed
    [kill]      the process kills itself in `step`, as the system's out-of-memory killer would
    [oom:N]     `step` raises OutOfMemory for more than N samples; [oom:0] always

Only `seconds_per_step` (the same for any batch) and `seconds_per_sample` take real time.
"""

import hashlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from jobs.catalog import Model
from jobs.errors import ImageFailed, OutOfMemory
from jobs.request import ImageRequest
from pipelines.seam import Card, Conditioning, PromptForm, Sample

_OUT_OF_MEMORY = re.compile(r"\[oom:(\d+)\]")


class FakePipeline:
    """The seam's Pipeline. `calls` lists the samples' seeds of every `step`, in order."""

    def __init__(
        self,
        seconds_per_step: float = 0.0,
        seconds_per_sample: float = 0.0,
        largest_batch: int | None = None,
        multiple: int = 16,
        max_prompt_tokens: int = 77,
        guidance: str = "classifier-free",
        phased: bool = False,
        in_flight: int = 1,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.phased = phased
        self.in_flight = in_flight
        self.seconds_per_step = seconds_per_step
        self.seconds_per_sample = seconds_per_sample
        self.largest_batch = largest_batch
        self.calls: list[list[int]] = []
        self.card = Card(
            "fake", multiple, guidance, True, max_prompt_tokens, "FakeScheduler", PromptForm()
        )
        self._sleep = sleep

    def tokenizer_json(self) -> str | None:
        """One token per word."""
        words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
        words.pre_tokenizer = WhitespaceSplit()
        return str(words.to_str())

    def check(self) -> None:
        """Do nothing: there's no group to lose."""

    def batch_key(self, request: ImageRequest) -> Hashable:
        """Same size, same rows."""
        return request.width, request.height, self.rows(request)

    def rows(self, request: ImageRequest) -> int:
        """2 under classifier-free guidance, else 1."""
        guided = self.card.guidance == "classifier-free" and request.guidance_scale > 1
        return 2 if guided else 1

    def tokens(self, request: ImageRequest) -> int:
        """Cells of the size grid."""
        return (request.width // self.card.multiple) * (request.height // self.card.multiple)

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditioning]:
        """One token per word; a prompt with more tokens than the card's limit is truncated."""
        limit = self.card.max_prompt_tokens or math.inf
        conditionings = []
        for request in requests:
            tensors = {"prompt_embeds": _noise(request.prompt, 0, (1, 4))}
            is_cut = len(request.prompt.split()) > limit
            conditionings.append(Conditioning(tensors, is_cut, ("prompt",) if is_cut else ()))
        return conditionings

    def start(self, request: ImageRequest, conditioning: Conditioning) -> Sample:
        """Four colours from seed and prompt; the latents merely count the steps."""
        grid = self.card.multiple
        if request.width % grid or request.height % grid:
            raise ImageFailed(f"{request.width}x{request.height} is not a multiple of {grid}")
        if "[refuse]" in request.prompt:
            raise ImageFailed("the fake was told to refuse")
        colours = _noise(request.prompt, request.seed, (1, 3, 2, 2))
        return Sample(
            request, conditioning, torch.zeros(1), None, request.steps, extra={"colours": colours}
        )

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        """Sleep for the duration of a step, then advance every sample."""
        self.calls.append([s.request.seed for s in samples])
        self._misbehave(samples, max(bucket, len(samples)))
        seconds = self.seconds_per_step + self.seconds_per_sample * max(bucket, len(samples))
        if seconds:
            self._sleep(seconds)
        for sample in samples:
            if "[nan]" in sample.request.prompt and sample.step == sample.steps - 1:
                sample.error = "the fake produced NaN"
                continue
            assert sample.latents is not None
            sample.latents = sample.latents + 1
            sample.step += 1

    def decode(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """Four flat quarters in the sample's colours."""
        return [_picture(sample) for sample in samples]

    def preview(self, sample: Sample) -> torch.Tensor | None:
        """The picture, darker at earlier steps; None before the first step."""
        return _picture(sample) * (sample.step / sample.steps) if sample.step else None

    def _misbehave(self, samples: Sequence[Sample], size: int) -> None:
        if self.largest_batch is not None and size > self.largest_batch:
            raise OutOfMemory(f"the fake holds {self.largest_batch} samples, not {size}")
        for sample in samples:
            prompt = sample.request.prompt
            limit = _OUT_OF_MEMORY.search(prompt)
            if limit and size > int(limit[1]):
                raise OutOfMemory(f"the fake was told to hold {limit[1]} samples, not {size}")
            if "[raise]" in prompt:
                raise RuntimeError("the fake was told to raise")
            if "[kill]" in prompt:
                os.kill(os.getpid(), signal.SIGKILL)


def fake_of(model: Model) -> FakePipeline | None:
    """The fake that the model's folder describes; None for any other model."""
    if not model.local:
        return None
    try:
        index = json.loads((Path(model.path) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the loaders say what's wrong
    if not isinstance(index, dict) or index.get("_class_name") != FakePipeline.__name__:
        return None
    return FakePipeline(**index.get("options", {}))


def _noise(text: str, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(shape, generator=generator)


def _picture(sample: Sample) -> torch.Tensor:
    size = (sample.request.height, sample.request.width)
    return torch.nn.functional.interpolate(sample.extra["colours"], size=size, mode="nearest")[0]
