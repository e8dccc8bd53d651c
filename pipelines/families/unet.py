"""Guidance as an input of the UNet, for checkpoints distilled with it, such as LCM."""

from collections.abc import Sequence
from typing import Any

import torch

from pipelines.seam import Sample


def takes_guidance(unet: Any) -> bool:
    """Whether the UNet was distilled with the guidance scale as an input."""
    width: int | None = unet.config.time_cond_proj_dim
    return width is not None


def embedded_guidance(
    pipe: Any, rows: Sequence[Sample], latents: torch.Tensor
) -> torch.Tensor | None:
    """The embedding [rows, d] of each guidance scale minus 1; None if the UNet takes none."""
    if not takes_guidance(pipe.unet):
        return None
    weights = torch.tensor([s.request.guidance_scale - 1 for s in rows])
    embedding: torch.Tensor = pipe.get_guidance_scale_embedding(
        weights, embedding_dim=pipe.unet.config.time_cond_proj_dim
    )
    return embedding.to(device=latents.device, dtype=latents.dtype)
