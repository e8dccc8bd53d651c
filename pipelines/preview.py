"""A guess at a running sample's finished latents, at the cost of one multiplication.

Euler schedulers draw a straight line from the noise level they stand at to the next; followed on
to level 0, the last step's line ends at the model's own guess of the clean image. Other schedulers
bend, or count their noise otherwise: there the latents are taken as they are, and the noise shows.
Knows no model.
"""

import torch

from pipelines.seam import Sample

STRAIGHT = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler")
"""Schedulers whose step is linear in `sigmas`, and whose latents are image plus sigma x noise."""


def finished_latents(sample: Sample) -> torch.Tensor | None:
    """Where the latents are heading, shaped like them; None before the first step.

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
