"""The range that finished pixels must have, checked before anything is made of them.

A picture whose values are NaN or outside of 0..1 would wrap around as bytes and look like noise, so
it is refused. Knows no model.
"""

import torch

from jobs.errors import ImageFailed

HALF_STEP = 0.5 / 255
"""Half a step of an 8-bit picture: a value this far outside of 0..1 still rounds to 0 or 255."""


def check_pixels(pixels: torch.Tensor) -> None:
    """Raise ImageFailed unless every pixel is a number in 0..1, up to rounding.

    `pixels` has any shape and any float dtype, on any device.
    """
    low, high = (value.item() for value in pixels.aminmax())
    # NaN spreads to both ends and fails the comparison.
    if not (low >= -HALF_STEP and high <= 1 + HALF_STEP):
        if low != low or high != high or high == torch.inf or low == -torch.inf:
            raise ImageFailed("the pixels are NaN or infinite")
        raise ImageFailed(f"the pixels go from {low:.3g} to {high:.3g}, not from 0 to 1")
