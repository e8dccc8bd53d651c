"""Decoding an image tile by tile, which takes less memory and changes the picture a little.

A last resort for one image that does not fit: tiles see less of the picture and are blended where
they overlap. Knows diffusers' autoencoders, and leaves them as they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TILE = 512
"""Pixels of a tile's side, at most. Many checkpoints would only tile what is larger than 1024."""


def can_tile(vae: Any) -> bool:
    """Whether the autoencoder knows tiling and does not tile already."""
    return getattr(vae, "use_tiling", None) is False


@contextmanager
def tiled(vae: Any) -> Iterator[None]:
    """Decode in tiles inside the block, and as before after it."""
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
    """Tile sizes for autoencoders whose own come from their training size; others have 256 or 512.

    `tile_sample_min_size` counts pixels, `tile_latent_min_size` the same in latents.
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
