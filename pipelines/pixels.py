"""Check the range of finished pixels before they become an image file.

Values that are NaN or outside of 0..1 would wrap around as bytes and look like noise, so such a
picture is refused.
"""

import torch

from jobs.errors import ImageFailed

HALF_STEP = 0.5 / 255
"""Half a step of an 8-bit picture; a value this far outside of 0..1 still rounds to 0 or 255."""


def check_pixels(pixels: torch.Tensor) -> None:
    """Raise ImageFailed unless every pixel is in 0..1, up to rounding.

    `pixels` has any shape and any float dtype, on any device.
    """
    low, high = (value.item() for value in pixels.aminmax())
    # NaN becomes both the minimum and the maximum, and fails the comparison.
    if not (low >= -HALF_STEP and high <= 1 + HALF_STEP):
        if low != low or high != high or high == torch.inf or low == -torch.inf:
            raise ImageFailed("the pixels are NaN or infinite")
        raise ImageFailed(f"the pixels range from {low:.3g} to {high:.3g}, not from 0 to 1")
