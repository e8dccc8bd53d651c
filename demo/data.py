"""Training examples: scenes as packed latents, each with several captions as tokens.

Several processes compute the latents once for each resolution, in chunks, and store them in
the work folder.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from demo.captions import caption
from demo.progress import Log, save_atomically
from demo.scenes import random_scene, render
from demo.text import Tokens, tokenize
from demo.tokenizers import clip_tokenizer, t5_tokenizer

CHUNK: Final = 1024
CAPTIONS: Final = 6
"""Different sentences for each scene."""


@dataclass(frozen=True)
class Resolution:
    """Pictures of one size, (height, width) in pixels, and their share of training."""

    size: tuple[int, int]
    scenes: int
    share: float  # of all training steps
    batch: int

    @property
    def name(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"

    def chunks(self) -> range:
        return range(0, self.scenes, CHUNK)


RESOLUTIONS: Final = (
    Resolution((128, 128), 20 * CHUNK, 0.76, 32),
    Resolution((192, 192), 3 * CHUNK, 0.08, 14),
    Resolution((128, 192), 3 * CHUNK, 0.08, 21),
    Resolution((192, 128), 3 * CHUNK, 0.08, 21),
)


@dataclass(frozen=True)
class Examples:
    """N scenes of one size."""

    latents: Tensor  # (N, image tokens, 32), normalised as the pipeline does
    clip: Tensor  # (N, CAPTIONS, TEXT_TOKENS)
    t5: Tensor  # (N, CAPTIONS, TEXT_TOKENS)

    def pick(self, count: int) -> tuple[Tensor, Tokens]:
        """Latents of random scenes, each with one of its captions."""
        scenes = torch.randint(len(self.latents), (count,))
        version = torch.randint(CAPTIONS, (count,))
        tokens = Tokens(self.clip[scenes, version].long(), self.t5[scenes, version].long())
        return self.latents[scenes].float(), tokens


@torch.no_grad()
def encode(vae: Any, pictures: Tensor) -> Tensor:
    """(N, image tokens, 32): latents normalised and packed as FluxPipeline packs them."""
    pictures = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        mean = vae.encode(pictures).latent_dist.mean.float()
    latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    packed: Tensor = FluxPipeline._pack_latents(latents.contiguous(), *latents.shape)
    return packed


def _make_chunk(vae_folder: Path, resolution: Resolution, first: int, path: Path) -> str:
    """Write one chunk of examples; runs in its own process."""
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float32).eval()
    vae = vae.to(memory_format=torch.channels_last)
    rng = random.Random(f"{resolution.name} {first}")
    scenes = [random_scene(rng) for _ in range(min(CHUNK, resolution.scenes - first))]
    sentences = [caption(rng, scene) for scene in scenes for _ in range(CAPTIONS)]
    tokens = tokenize(clip_tokenizer(), t5_tokenizer(), sentences)
    parts = [scenes[start : start + 16] for start in range(0, len(scenes), 16)]
    state = {
        "latents": torch.cat([encode(vae, render(part, resolution.size)) for part in parts]).half(),
        "clip": tokens.clip.view(len(scenes), CAPTIONS, -1).short(),
        "t5": tokens.t5.view(len(scenes), CAPTIONS, -1).short(),
    }
    save_atomically(state, path)
    return path.name


def make(
    work: Path, log: Log, resolutions: tuple[Resolution, ...] = RESOLUTIONS, processes: int = 2
) -> dict[Resolution, Examples]:
    """All examples; chunks missing in `work/latents` are made with `work/vae`."""
    folder = work / "latents"
    folder.mkdir(exist_ok=True)
    paths = {
        (resolution, first): folder / f"{resolution.name}-{first:05}.pt"
        for resolution in resolutions
        for first in resolution.chunks()
    }
    orders = [
        (work / "vae", resolution, first, path)
        for (resolution, first), path in paths.items()
        if not path.exists()
    ]
    for name in _made(orders, processes):
        log(f"data {name}")
    return {
        resolution: _load([paths[resolution, first] for first in resolution.chunks()])
        for resolution in resolutions
    }


def _made(orders: list[tuple[Path, Resolution, int, Path]], processes: int) -> Iterator[str]:
    """Yield the names of the chunks as they are written; one process means this one."""
    if processes == 1 or not orders:
        yield from itertools.starmap(_make_chunk, orders)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(_make_chunk, *order) for order in orders]:
            yield job.result()


def _load(paths: list[Path]) -> Examples:
    chunks = [torch.load(path, weights_only=True) for path in paths]
    return Examples(
        *(torch.cat([chunk[name] for chunk in chunks]) for name in ("latents", "clip", "t5"))
    )
