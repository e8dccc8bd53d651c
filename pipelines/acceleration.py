"""Optional accelerations of a step: compilation and a feature cache.

Both are off by default and change pictures: the cache visibly, compilation in the last bits. If one
isn't possible, ConfigurationError is raised; there's no silent fallback. Quantization has its own
module. This module doesn't depend on any family's mathematics.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import structlog
from diffusers import TaylorSeerCacheConfig

from jobs.catalog import Model
from jobs.errors import ConfigurationError, OutOfMemory, first_line
from jobs.request import ImageRequest
from pipelines.loading.components import DENOISERS
from pipelines.seam import Pipeline

COMPILATIONS = 4096
"""Most shapes per block that are compiled. Beyond torch's own limit of 8 a forward pass would
raise, and QwenImage and ZImage have a shape per prompt length."""

log = structlog.get_logger(__name__)


_CACHES = {"taylorseer": TaylorSeerCacheConfig}
"""A catalog's name of a cache -> diffusers' config of it."""


def denoiser_of(pipe: Any) -> Any:
    """The module that runs the denoising steps; None if the pipeline has none by a known name."""
    modules = (getattr(pipe, name, None) for name in DENOISERS)
    return next((module for module in modules if module is not None), None)


def enable_cache(denoiser: Any, model: Model) -> None:
    """Enable the entry's feature cache, if it sets one. Raises ConfigurationError.

    Only for whole calls: a cache keeps the rows of the last step, and under step batching the next
    step's rows belong to other samples.
    """
    if model.cache is None:
        return
    if not hasattr(denoiser, "enable_cache"):
        raise ConfigurationError(f"cache: {type(denoiser).__name__} doesn't support caches")
    denoiser.enable_cache(_CACHES[model.cache](taylor_factors_dtype=denoiser.dtype))


def compile_blocks(denoiser: Any, trial: Callable[[], None]) -> None:
    """Compile each repeated block, once per shape, and run it once.

    Shapes are static, so that the bits of a picture depend only on its bucket and not on the shapes
    that the process ran before. Raises ConfigurationError for a model without repeated blocks, or
    if the compiler fails.
    """
    name = type(denoiser).__name__
    if not getattr(denoiser, "_repeated_blocks", None):
        raise ConfigurationError(f"compile: {name} has no repeated blocks")
    limits: Any = import_module("torch._dynamo.config")
    limits.recompile_limit = limits.accumulated_recompile_limit = COMPILATIONS
    try:
        denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False)
        trial()
    except OutOfMemory:
        raise
    except Exception as error:  # the compiler's errors share no base class
        raise ConfigurationError(f"compile: {name}: {first_line(error)}") from error
    log.info("compiled", denoiser=name)


def run_once(pipeline: Pipeline, model: Model) -> None:
    """Run the denoiser on one prompt, then on two of unequal length, at the default size.

    Raises the denoiser's errors, except OutOfMemory for the two: a single one may still fit.
    """
    alone, other = (_sample(pipeline, model, prompt) for prompt in ("a", "a cat that is longer"))
    pipeline.step([alone])
    if not pipeline.card.joins:
        return
    try:
        pipeline.step([alone, other])
    except OutOfMemory:
        log.info("two samples don't fit", model=model.name)


def _sample(pipeline: Pipeline, model: Model, prompt: str) -> Any:
    defaults, grid = model.defaults, pipeline.card.multiple
    request = ImageRequest(
        model=model.name,
        prompt=prompt,
        seed=0,
        width=defaults.width - defaults.width % grid,
        height=defaults.height - defaults.height % grid,
        steps=2,
        guidance_scale=defaults.guidance_scale,
        reproducible=False,
    )
    [conditioning] = pipeline.encode([request])
    return pipeline.start(request, conditioning)
