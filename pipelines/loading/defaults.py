"""Derive a model's own defaults from its pipeline class's signature and its configs.

The class's signature has the authors' defaults: steps, guidance and often the size. A checkpoint
distilled to few steps has the same class as its base model; `few_steps` recognizes it by its
configs. If the configs don't show it (SD3.5 Turbo's are those of SD3.5), the class's defaults
apply unless the entry sets `defaults`. No weights are read.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.catalog import Defaults, Model
from pipelines.acceleration import denoiser_of
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.components import DENOISERS, naming
from pipelines.loading.examination import read_object
from pipelines.planner.skeleton import skeletons, vae_scale

_DECODERS = ("vae", "movq", "vqvae", "vqgan")
_GENERIC = Defaults()

_SIZED_BY_CONFIG = frozenset({"SanaPipeline", "SanaPAGPipeline", "SanaSprintPipeline"})
"""Classes with one size in the signature but checkpoints for several: 512, 1024, 2048, 4096."""


@dataclass(frozen=True, slots=True)
class Configs:
    """A checkpoint's JSON: its index, and the configs of denoiser, decoder and scheduler.

    `sampler` is the scheduler's class; `decoder` is None where latents are pixels.
    """

    index: Mapping[str, Any]
    sampler: str | None
    denoiser: Mapping[str, Any]
    decoder: Mapping[str, Any] | None
    scheduler: Mapping[str, Any]


def own_defaults(model: Model, checkpoint: Checkpoint) -> Defaults:
    """The defaults of the model in this folder, regardless of its entry.

    Raises ModelUnavailable if diffusers doesn't have the pipeline.
    """
    with naming(model.name):
        configs = _read(checkpoint)
    signature = inspect.signature(checkpoint.pipeline_class(model).__call__)
    usual = {name: parameter.default for name, parameter in signature.parameters.items()}
    width, height = _size(model, checkpoint, configs, usual)
    steps, guidance = few_steps(configs) or (_steps(usual), _guidance(usual, configs))
    return Defaults(width, height, steps, guidance)


def few_steps(configs: Configs) -> tuple[int, float] | None:
    """The published steps and guidance of a model distilled to few steps; None for other models."""
    index, denoiser, scheduler = configs.index, configs.denoiser, configs.scheduler
    pipeline, sampler = index.get("_class_name"), configs.sampler
    is_static = not scheduler.get("use_dynamic_shifting")
    if index.get("is_distilled"):  # FLUX.2 klein
        return 4, 1.0
    if pipeline == "FluxPipeline" and not denoiser.get("guidance_embeds") and is_static:
        return 4, 0.0  # FLUX.1 schnell; undistilled ones shift by the image's size
    if pipeline == "ZImagePipeline" and is_static and scheduler.get("shift") == 3.0:
        return 8, 0.0  # Z-Image-Turbo; the base model's shift is 6
    if sampler in ("LCMScheduler", "TCDScheduler") and pipeline != "LatentConsistencyModelPipeline":
        return 4, 8.5 if denoiser.get("time_cond_proj_dim") else 0.0
    if pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline") and _is_turbo(configs):
        # SD Turbo and SDXL Turbo make 512 pixels in one step; SDXL Lightning makes 1024 in four.
        return 1 if denoiser.get("sample_size") == 64 else 4, 0.0
    return None


def _is_turbo(configs: Configs) -> bool:
    """Whether the sampler is Euler's and starts at the last timestep, as few-step models need.

    Models trained down to zero signal also start there, but they predict velocities.
    """
    scheduler = configs.scheduler
    return (
        configs.sampler in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        and scheduler.get("timestep_spacing") == "trailing"
        and scheduler.get("prediction_type", "epsilon") != "v_prediction"
        and not scheduler.get("rescale_betas_zero_snr")
    )


def _steps(usual: Mapping[str, Any]) -> int:
    steps = usual.get("num_inference_steps")
    return steps if isinstance(steps, int) else _GENERIC.steps


def _guidance(usual: Mapping[str, Any], configs: Configs) -> float:
    """The default of the parameter that `guidance_scale` is passed as; 0 if there isn't one."""
    is_true = "true_cfg_scale" in usual and not configs.denoiser.get("guidance_embeds")
    scale = usual.get("true_cfg_scale" if is_true else "guidance_scale")
    return float(scale) if isinstance(scale, int | float) else 0.0


def _size(
    model: Model, checkpoint: Checkpoint, configs: Configs, usual: Mapping[str, Any]
) -> tuple[int, int]:
    """Width and height in pixels."""
    width, height = usual.get("width"), usual.get("height")
    by_config = checkpoint.class_name in _SIZED_BY_CONFIG
    if isinstance(width, int) and isinstance(height, int) and not by_config:
        return width, height
    if "default_sample_size" in configs.index:  # PRX: in pixels
        side = int(configs.index["default_sample_size"])
        return side, side
    cells, scale = _latent_size(model, checkpoint, configs)
    if cells is None:
        return _GENERIC.width, _GENERIC.height
    rows, columns = cells if isinstance(cells, list | tuple) else (cells, cells)
    return int(columns * scale), int(rows * scale)


def _latent_size(model: Model, checkpoint: Checkpoint, configs: Configs) -> tuple[Any, int]:
    """The latent size in cells (of one side, or height and width), and pixels per cell.

    The pipeline itself, built without weights, is the best source. If it can't be built, both are
    read from configs.
    """
    cells = configs.denoiser.get("sample_size")
    scale = 1 if configs.decoder is None else vae_scale(configs.decoder)
    try:
        pipe = checkpoint.load(model, **skeletons(model, checkpoint))
    except Exception:  # from any library; loading reports whether the folder is broken
        return cells, scale
    own = getattr(denoiser_of(pipe), "config", {}).get("sample_size", cells)
    if configs.decoder is None:
        return own, 1
    return getattr(pipe, "default_sample_size", own), getattr(pipe, "vae_scale_factor", scale)


def _read(checkpoint: Checkpoint) -> Configs:
    def config(names: tuple[str, ...], file: str = "config.json") -> Mapping[str, Any] | None:
        name = next((name for name in names if name in checkpoint.components), None)
        path = checkpoint.source(str(name)).config / file
        return read_object(path) if name is not None and path.is_file() else None

    return Configs(
        index=checkpoint.index,
        sampler=checkpoint.components.get("scheduler"),
        denoiser=config(DENOISERS) or {},
        decoder=config(_DECODERS),
        scheduler=config(("scheduler",), "scheduler_config.json") or {},
    )
