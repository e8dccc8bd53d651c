"""A sample's own scheduler, set to its number of steps, and its initial noise.

Schedulers store their position and history, so samples that step at different times can't share
one. The formulas are diffusers' own.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor


def own_scheduler(template: Any, steps: int, device: torch.device, **options: Any) -> Any:
    """A copy of `template` with its timesteps set; `options` are passed to `set_timesteps`."""
    scheduler = copy.deepcopy(template)
    retrieve_timesteps(scheduler, steps, device, **options)
    return scheduler


def resolution_shift(config: Mapping[str, Any], tokens: int, max_shift: float = 1.15) -> float:
    """`mu`, which shifts a schedule towards noise for large images: linear in image tokens."""
    shift: float = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
    return shift


def flow_sigmas(config: Mapping[str, Any], steps: int) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Evenly spaced noise levels [steps] from 1 to 1/steps; None if the scheduler has its own."""
    return None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)


def first_latents(
    scheduler: Any, shape: tuple[int, ...], generator: torch.Generator, like: torch.Tensor
) -> torch.Tensor:
    """Noise of `shape` at the scheduler's first noise level, in the dtype and device of `like`.

    Equals the pipelines' `prepare_latents`, which reads the level from the pipeline's scheduler.
    """
    noise: torch.Tensor = randn_tensor(
        shape, generator=generator, device=like.device, dtype=like.dtype
    )
    return noise * float(scheduler.init_noise_sigma)
