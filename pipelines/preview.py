"""Estimate a running sample's finished latents, at the cost of one multiplication.

An Euler scheduler's step is a straight line from one noise level to the next. Extended to level 0,
the last step's line ends at the model's own estimate of the clean image. Other schedulers' steps
are curved, or measure noise differently; for them the noisy latents are returned unchanged.
"""

import torch

from pipelines.seam import Sample

STRAIGHT = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler")
"""Schedulers whose step is linear in `sigmas`, and whose latents are image + sigma x noise."""


def finished_latents(sample: Sample) -> torch.Tensor | None:
    """The estimated finished latents, of the same shape; None before the first step.

    x - sigma (x - previous) / (sigma - previous sigma).
    """
    previous: torch.Tensor | None = sample.extra.get("previous")
    latents = sample.latents
    if previous is None or latents is None:
        return None
    if type(sample.scheduler).__name__ not in STRAIGHT:
        return latents
    before, now = sample.scheduler.sigmas[sample.step - 1 : sample.step + 1].tolist()
    return latents - float(now / (now - before)) * (latents - previous)
