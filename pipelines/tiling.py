"""Decode an image in tiles, which takes less memory but changes the picture slightly.

This is a last resort for a single image that doesn't fit: each tile sees only part of the picture,
and tiles are blended where they overlap. Works with diffusers' autoencoders, and restores their
settings afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TILE = 512
"""Largest side of a tile, in pixels. By default many checkpoints only tile images above 1024."""


def can_tile(vae: Any) -> bool:
    """Whether the autoencoder supports tiling and doesn't tile already."""
    return getattr(vae, "use_tiling", None) is False


@contextmanager
def tiled(vae: Any) -> Iterator[None]:
    """Decode in tiles inside the block; restore the autoencoder's settings after it."""
    sizes = _smaller_tiles(vae)
    before = {name: getattr(vae, name) for name in sizes}
    vae.enable_tiling()
    try:
        _set(vae, sizes)
        yield
    finally:
        _set(vae, before)
        vae.disable_tiling()


def _smaller_tiles(vae: Any) -> dict[str, int]:
    """Tile sizes for autoencoders that use their training size; others use 256 or 512 already.

    `tile_sample_min_size` is in pixels, `tile_latent_min_size` is the same in latents.
    """
    pixels = getattr(vae, "tile_sample_min_size", None)
    latents = getattr(vae, "tile_latent_min_size", None)
    if not isinstance(pixels, int) or not isinstance(latents, int) or pixels <= TILE:
        return {}
    return {
        "tile_sample_min_size": TILE,
        "tile_latent_min_size": TILE * latents // pixels,
    }


def _set(vae: Any, values: dict[str, int]) -> None:
    for name, value in values.items():
        setattr(vae, name, value)
