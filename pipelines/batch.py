"""The forward batch: turn samples at different steps into rows of one forward pass, and back.

This is what all step-level families have in common: padding to a bucket, one scheduler per sample,
classifier-free guidance and the check for NaN. All functions are pure except `advance`, which
commits the step to all samples, or to none if anything raises.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jobs.request import ImageRequest
from pipelines.seam import Conditioning, Sample

NEGATIVE = "negative_"
"""Prefix of the negative prompt's tensors in a Conditioning, as diffusers names them."""


def seeded(request: ImageRequest) -> torch.Generator:
    """The request's generator, on the CPU so that every device draws the same noise."""
    return torch.Generator().manual_seed(request.seed)


def new_sample(
    request: ImageRequest,
    conditioning: Conditioning,
    latents: torch.Tensor,
    scheduler: Any,
    generator: torch.Generator,
    **extra: Any,
) -> Sample:
    """A sample at step 0 of a scheduler whose timesteps are set; one step is one forward pass.

    `generator` has drawn the latents, and later draws the noise of a stochastic scheduler.
    """
    steps = len(scheduler.timesteps)
    extra["generator"] = generator
    return Sample(request, conditioning, latents, scheduler, steps, extra=extra)


def padded(samples: Sequence[Sample], bucket: int) -> list[Sample]:
    """The samples, repeated in order until there are `bucket` of them."""
    missing = max(0, bucket - len(samples))
    return [*samples, *(samples[i % len(samples)] for i in range(missing))]


def current_timestep(sample: Sample) -> torch.Tensor:
    """The scheduler's timestep at the sample's current step: a scalar in 0..1000."""
    timestep: torch.Tensor = sample.scheduler.timesteps[sample.step]
    return timestep


def timesteps(batch: Sequence[Sample], guided: bool) -> torch.Tensor:
    """One timestep per row, [rows], in the schedulers' own dtype."""
    return torch.stack([current_timestep(s) for s in batch]).repeat(2 if guided else 1)


def latents(batch: Sequence[Sample], guided: bool, scaled: bool = False) -> torch.Tensor:
    """All latents, [rows, ...]; `scaled` by their schedulers, as UNets expect their input."""
    rows = [_model_input(s, scaled) for s in batch]
    return torch.cat(rows * 2 if guided else rows)


def embeddings(batch: Sequence[Sample], name: str, guided: bool) -> torch.Tensor:
    """The conditionings' tensors `name`, [rows, ...]: positive rows, then negative ones."""
    keys = (name, NEGATIVE + name) if guided else (name,)
    return torch.cat([s.conditioning.tensors[key] for key in keys for s in batch])


def scales(batch: Sequence[Sample]) -> torch.Tensor:
    """Guidance scales, float32 [samples], for a model that takes guidance as an input."""
    like = batch[0].latents
    device = like.device if like is not None else None
    return torch.tensor(
        [s.request.guidance_scale for s in batch], dtype=torch.float32, device=device
    )


def without_variance(output: torch.Tensor, config: Any) -> torch.Tensor:
    """The output without the second half of its channels if the model also predicts variance."""
    learns_variance = config.out_channels // 2 == config.in_channels
    return output.chunk(2, dim=1)[0] if learns_variance else output


def predictions(output: torch.Tensor, batch: Sequence[Sample], guided: bool) -> list[torch.Tensor]:
    """Split a model's output [rows, ...] into a prediction [1, ...] per sample, with guidance.

    The formula is diffusers': negative + scale (positive - negative), eq. 6 of arXiv:2207.12598
    with scale = w + 1. Each scale is a Python number, as in diffusers, so that half precision
    rounds the same way.
    """
    if not guided:
        return list(output.chunk(len(batch)))
    positive, negative = (half.chunk(len(batch)) for half in output.chunk(2))
    return [
        n + s.request.guidance_scale * (p - n)
        for s, p, n in zip(batch, positive, negative, strict=True)
    ]


def pixels(pipe: Any, image: torch.Tensor) -> torch.Tensor:
    """Convert a VAE's image [1, 3, height, width] in -1..1 to [3, height, width] in 0..1."""
    processed: torch.Tensor = pipe.image_processor.postprocess(image, output_type="pt")
    return processed[0]


def advance(
    samples: Sequence[Sample], predicted: Sequence[torch.Tensor], eta: float | None = None
) -> None:
    """Advance every sample with its own scheduler; extra predictions of padding rows are ignored.

    `eta` is passed to schedulers that take it, as in diffusers' `prepare_extra_step_kwargs`. None
    leaves them at their default, as in pipelines without that method. A sample whose latents are
    no longer finite gets an `error` and isn't advanced.
    """
    # Compute all results before changing any sample, so that an error leaves them all unchanged.
    stepped = [_step(s, p, eta) for s, p in zip(samples, predicted, strict=False)]
    # One transfer from the device for the whole batch, not one per sample.
    finite = torch.stack([torch.isfinite(new).all() for new, _, _ in stepped]).tolist()
    for sample, (new, scheduler, generator), good in zip(samples, stepped, finite, strict=True):
        if not good:
            sample.error = (
                f"denoising produced NaN or infinity at step {sample.step + 1} of {sample.steps}"
            )
            continue
        sample.extra |= {"generator": generator, "previous": sample.latents}
        sample.latents, sample.scheduler = new, scheduler
        sample.step += 1


def _model_input(sample: Sample, scaled: bool) -> torch.Tensor:
    assert sample.latents is not None
    if not scaled:
        return sample.latents
    timestep = current_timestep(sample)
    model_input: torch.Tensor = sample.scheduler.scale_model_input(sample.latents, timestep)
    return model_input


def _step(
    sample: Sample, predicted: torch.Tensor, eta: float | None
) -> tuple[torch.Tensor, Any, torch.Generator]:
    """The sample's next latents, scheduler and generator; the sample itself isn't changed."""
    assert sample.latents is not None
    scheduler = _fork(sample.scheduler)
    generator: torch.Generator = sample.extra["generator"].clone_state()
    options: dict[str, Any] = {"generator": generator, "eta": eta}
    if eta is None:
        del options["eta"]
    parameters = _parameters(type(scheduler).step)
    new_latents: torch.Tensor = scheduler.step(
        predicted,
        current_timestep(sample),
        sample.latents,
        return_dict=False,
        **{name: value for name, value in options.items() if name in parameters},
    )[0]
    return new_latents.to(sample.latents.dtype), scheduler, generator


@functools.cache
def _parameters(step: Callable[..., Any]) -> frozenset[str]:
    """Parameters of a scheduler class's step. Cached, because inspecting costs more than a step."""
    return frozenset(inspect.signature(step).parameters)


def _fork(scheduler: Any) -> Any:
    """Copy a scheduler so that it steps independently; multistep schedulers have history lists."""
    fork = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(fork, name, list(value))
    return fork
