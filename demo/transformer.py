"""The denoiser: a FluxTransformer2DModel of 2.2 million parameters, and its call in training.

Training uses few pad tokens, and an attention bias that makes them count as many; see
`demo.text`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, attention_backend
from torch import Tensor, nn

from demo.text import T5_PAD, WIDTH, TextEncoders, Tokens
from demo.vae import LATENT_CHANNELS

HEADS: Final = 4
HEAD: Final = 32
PIXELS_PER_TOKEN: Final = 16
MOST_PADS: Final = 512


def build() -> Any:
    """An untrained denoiser that predicts zero; every gate starts at one half."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=6,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            _open_gates(block.norm1.linear, parts=6, gates=(2, 5))
            _open_gates(block.norm1_context.linear, parts=6, gates=(2, 5))
        for block in transformer.single_transformer_blocks:
            _open_gates(block.norm.linear, parts=3, gates=(2,))
        for layer in (transformer.norm_out.linear, transformer.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return transformer


def _open_gates(modulation: Any, parts: int, gates: tuple[int, ...]) -> None:
    """Set a block's shifts and scales to zero and its gates to one half."""
    nn.init.zeros_(modulation.weight)
    nn.init.zeros_(modulation.bias)
    for gate in gates:
        modulation.bias.view(parts, -1)[gate] = 0.5


@contextmanager
def plain_attention(transformer: Any, text: TextEncoders) -> Iterator[None]:
    """Attention by matrix products instead of torch's fused kernel.

    On a CPU the fused kernel's backward pass takes half of a training step; matrix
    products take a tenth.
    """
    with attention_backend("native"):  # restores the process's default on exit
        transformer.set_attention_backend("_native_math")
    text.text_encoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        transformer.reset_attention_backend()
        text.text_encoder.set_attn_implementation("sdpa")


def image_positions(size: tuple[int, int]) -> Tensor:
    """(image tokens, 3): the row and column of every token of a (height, width) picture."""
    rows, columns = (length // PIXELS_PER_TOKEN for length in size)
    positions: Tensor = FluxPipeline._prepare_latent_image_ids(
        1, rows, columns, "cpu", torch.float32
    )
    return positions


def pad_bias(t5_tokens: Tensor) -> Tensor:
    """(N, text tokens): the bias that makes the few pads of a sentence weigh as 2 to 512.

    n equal keys with a bias of log(N / n) get as much attention as N without it.
    """
    pads = t5_tokens == T5_PAD
    few = pads.sum(1, keepdim=True).clamp(min=1)
    many = torch.exp(torch.rand(len(t5_tokens), 1) * math.log(MOST_PADS / 2)) * 2
    return torch.where(pads, torch.log(many / few), 0.0)


def predict(
    forward: Callable[..., Any],
    text: TextEncoders,
    noisy: Tensor,
    level: Tensor,
    tokens: Tokens,
    size: tuple[int, int],
) -> Tensor:
    """The velocity (N, image tokens, 32) of `noisy` at noise levels `level`, (N,), 0 to 1."""
    bias = torch.cat([pad_bias(tokens.t5), torch.zeros(noisy.shape[:2])], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity: Tensor = forward(
            hidden_states=noisy,
            timestep=level,
            pooled_projections=text.pooled(tokens.clip),
            encoder_hidden_states=text.words(tokens.t5),
            txt_ids=torch.zeros(tokens.t5.size(1), 3),
            img_ids=image_positions(size),
            joint_attention_kwargs={"attention_mask": bias[:, None, None]},
            return_dict=False,
        )[0]
    return velocity.float()
