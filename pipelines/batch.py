"""The forward batch: samples at different steps made into the rows of one forward pass and back.

What every step-level family does alike, and nothing that any of them does differently: rows padded
to a bucket, one scheduler a sample, classifier-free guidance, the check for NaN. Pure but for
`advance`, which commits the step to all samples or, when anything raises, to none.
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

    `generator` has drawn the latents and goes on to draw the noise of a stochastic scheduler.
    """
    steps = len(scheduler.timesteps)
    extra["generator"] = generator
    return Sample(request, conditioning, latents, scheduler, steps, extra=extra)


def padded(samples: Sequence[Sample], bucket: int) -> list[Sample]:
    """The samples, repeated from the first on until there are `bucket` of them."""
    missing = max(0, bucket - len(samples))
    return [*samples, *(samples[i % len(samples)] for i in range(missing))]


def current_timestep(sample: Sample) -> torch.Tensor:
    """The scheduler's timestep that the sample stands at: a scalar in 0..1000."""
    timestep: torch.Tensor = sample.scheduler.timesteps[sample.step]
    return timestep


def timesteps(batch: Sequence[Sample], guided: bool) -> torch.Tensor:
    """One timestep a row, [rows], in the schedulers' own dtype."""
    return torch.stack([current_timestep(s) for s in batch]).repeat(2 if guided else 1)


def latents(batch: Sequence[Sample], guided: bool, scaled: bool = False) -> torch.Tensor:
    """All latents, [rows, ...]; `scaled` by their schedulers, as UNets want their input."""
    rows = [_model_input(s, scaled) for s in batch]
    return torch.cat(rows * 2 if guided else rows)


def embeddings(batch: Sequence[Sample], name: str, guided: bool) -> torch.Tensor:
    """The conditionings' tensors of that name, [rows, ...]: positive rows, then negative ones."""
    names = (name, NEGATIVE + name) if guided else (name,)
    return torch.cat([s.conditioning.tensors[each] for each in names for s in batch])


def scales(batch: Sequence[Sample]) -> torch.Tensor:
    """Guidance scales, float32 [samples], for a model that has guidance as an input."""
    like = batch[0].latents
    device = like.device if like is not None else None
    return torch.tensor(
        [s.request.guidance_scale for s in batch], dtype=torch.float32, device=device
    )


def without_variance(output: torch.Tensor, config: Any) -> torch.Tensor:
    """The first half of the channels of a model that also predicts its variance; else all."""
    learns_variance = config.out_channels // 2 == config.in_channels
    return output.chunk(2, dim=1)[0] if learns_variance else output


def predictions(output: torch.Tensor, batch: Sequence[Sample], guided: bool) -> list[torch.Tensor]:
    """A model's output [rows, ...] as one prediction [1, ...] a sample, guidance applied.

    The formula is diffusers': negative + scale (positive - negative), eq. 6 of arXiv:2207.12598
    with scale = w + 1. Each scale is a Python number, as in diffusers, so that half precision
    rounds alike.
    """
    if not guided:
        return list(output.chunk(len(batch)))
    positive, negative = (half.chunk(len(batch)) for half in output.chunk(2))
    return [
        n + s.request.guidance_scale * (p - n)
        for s, p, n in zip(batch, positive, negative, strict=True)
    ]


def pixels(pipe: Any, image: torch.Tensor) -> torch.Tensor:
    """A VAE's image [1, 3, height, width] in -1..1 as [3, height, width] in 0..1."""
    processed: torch.Tensor = pipe.image_processor.postprocess(image, output_type="pt")
    return processed[0]


def advance(
    samples: Sequence[Sample], predicted: Sequence[torch.Tensor], eta: float | None = None
) -> None:
    """Step every sample by its own scheduler; `predicted` may go on with the padding's rows.

    `eta` goes to schedulers that take it, as diffusers' `prepare_extra_step_kwargs` passes it;
    None leaves them at their own default, as pipelines without that method do. A sample whose
    latents are no longer finite gets its `error` and stays where it was.
    """
    stepped = [_step(s, p, eta) for s, p in zip(samples, predicted, strict=False)]
    finite = torch.stack([torch.isfinite(new).all() for new, _, _ in stepped]).tolist()
    for sample, (new, scheduler, generator), good in zip(samples, stepped, finite, strict=True):
        if not good:
            sample.error = (
                f"the denoising came to NaN or infinity at step {sample.step + 1} of {sample.steps}"
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
    """The sample's next latents, scheduler and generator; the sample keeps its own."""
    assert sample.latents is not None
    scheduler = _fork(sample.scheduler)
    generator: torch.Generator = sample.extra["generator"].clone_state()
    options: dict[str, Any] = {"generator": generator, "eta": eta}
    if eta is None:
        del options["eta"]
    taken = _parameters(type(scheduler).step)
    moved: torch.Tensor = scheduler.step(
        predicted,
        current_timestep(sample),
        sample.latents,
        return_dict=False,
        **{name: value for name, value in options.items() if name in taken},
    )[0]
    return moved.to(sample.latents.dtype), scheduler, generator


@functools.cache
def _parameters(step: Callable[..., Any]) -> frozenset[str]:
    """What a scheduler class's step takes. Kept, since asking costs more than a step."""
    return frozenset(inspect.signature(step).parameters)


def _fork(scheduler: Any) -> Any:
    """A copy that can be stepped alone: multistep schedulers keep their history in lists."""
    fork = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(fork, name, list(value))
    return fork
