"""The picture codec: a small AutoencoderKL, trained on scattered shapes.

Latents have an eighth of the picture's height and width, and 8 channels. Training goes
from small crops to whole pictures. The decoder learns to remove noise from the latents,
because the transformer's are never exact.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from demo.muon import Muon
from demo.progress import Log, Smoothed, remaining_steps, warm_flat_cosine
from demo.scenes import random_scene, render, render_scatter

LATENT_CHANNELS: Final = 8
LATENT_NOISE: Final = 0.25
"""Largest deviation of the noise added to latents, whose own deviation is about 1.3."""


@dataclass(frozen=True)
class Phase:
    """`steps` batches of square pictures, `side` pixels high and wide."""

    steps: int
    side: int
    batch: int


PHASES: Final = (Phase(2200, 32, 16), Phase(3200, 64, 8), Phase(1200, 128, 4))
WHOLE: Final = 128
"""The smallest side of a training picture that may be a whole scene."""

RATE: Final = 2e-3


def build() -> Any:
    """An untrained codec; the variance of its latents isn't learnt."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    ).to(memory_format=torch.channels_last)
    with torch.no_grad():  # the upper half of the encoder's output is the log variance
        vae.encoder.conv_out.weight[LATENT_CHANNELS:] = 0
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -6.0
    return vae


def _optimiser(vae: Any) -> Muon:
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    for name, parameter in vae.named_parameters():
        edge = "conv_in" in name or name == "decoder.conv_out.weight"
        (inner if parameter.ndim == 4 and not edge else outer).append(parameter)
    return Muon([{"params": inner, "orthogonal": True, "weight_decay": 0.01}, {"params": outer}])


def _pictures(phase: Phase, step: int) -> Tensor:
    """A training batch, -1 to 1; half of the whole pictures are scenes, half scattered shapes."""
    size = (phase.side, phase.side)
    pictures = render_scatter(phase.batch, size)
    if phase.side >= WHOLE:
        rng = random.Random(f"vae {step}")
        scenes = [random_scene(rng) for _ in range(phase.batch // 2)]
        pictures = torch.cat([pictures[len(scenes) :], render(scenes, size)])
    return (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)


def _losses(vae: Any, pictures: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """(the loss, the mean squared error of the pictures)."""
    mean = vae.encoder(pictures)[:, :LATENT_CHANNELS]
    strength = noise * torch.rand(len(mean), 1, 1, 1)
    seen = vae.decoder(mean + strength * torch.randn_like(mean))
    squared = F.mse_loss(seen, pictures)
    return F.l1_loss(seen, pictures) + 0.5 * squared + 1e-3 * mean.square().mean(), squared


def _freeze_variance(vae: Any) -> None:
    vae.encoder.conv_out.weight.grad[LATENT_CHANNELS:] = 0
    vae.encoder.conv_out.bias.grad[LATENT_CHANNELS:] = 0


def train(work: Path, log: Log, phases: Sequence[Phase] = PHASES, measured: int = 128) -> Any:
    """The trained codec, in eval mode; resumes from `work/vae.pt`.

    `measured` is the number of scenes for measuring its latents.
    """
    torch.manual_seed(0)
    vae = build()
    optimiser, error = _optimiser(vae), Smoothed()
    schedule = [phase for phase in phases for _ in range(phase.steps)]
    parts = {"vae": vae, "optimiser": optimiser}
    for step in remaining_steps(len(schedule), work / "vae.pt", parts, seed=1):
        for group in optimiser.param_groups:
            group["lr"] = RATE * warm_flat_cosine(step, len(schedule), warm=60, flat=0.4) + 2e-5
        pictures = _pictures(schedule[step], step)
        loss, squared = _losses(vae, pictures, LATENT_NOISE * min(1.0, step / 1000))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        _freeze_variance(vae)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        error.add(squared.item())
        if (step + 1) % 100 == 0:
            decibel = decibels(error.value or 1.0)
            log(f"vae {step + 1}/{len(schedule)} side {schedule[step].side} psnr {decibel:.1f}")
    return _calibrated(vae.eval(), measured, log)


def decibels(squared: float) -> float:
    """Peak signal-to-noise ratio of pictures from -1 to 1."""
    return float(10 * torch.log10(torch.tensor(4 / squared)))


@torch.no_grad()
def _calibrated(vae: Any, count: int, log: Log) -> Any:
    """Set the factors that give latents of scenes zero mean and unit deviation."""
    rng = random.Random(5)
    pictures = render([random_scene(rng) for _ in range(count)], (128, 128)) * 2 - 1
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.chunk(8)])
    rebuilt = torch.cat([vae.decode(part).sample for part in latents.chunk(8)])
    vae.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
    )
    log(f"vae on {count} scenes: psnr {decibels(F.mse_loss(rebuilt, pictures).item()):.1f}")
    return vae
