"""What a catalog entry may ask for to make steps faster: compilation, a cache.

Each is off unless asked for, and changes pictures: the caches visibly, compilation in the last
bits. Whatever cannot be had is a ConfigurationError, never a silent step down. Quantization has a
module of its own. Knows no family's mathematics.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import structlog
from diffusers import TaylorSeerCacheConfig

from jobs.catalog import Model
from jobs.errors import ConfigurationError, OutOfMemory
from jobs.request import ImageRequest
from pipelines.families import FAMILIES
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.components import DENOISERS
from pipelines.seam import Pipeline

COMPILATIONS = 4096
"""How many shapes of a block are compiled. Past torch's own limit of 8 a forward pass would raise,
and prompts of many lengths make many shapes under QwenImage and ZImage."""

log = structlog.get_logger(__name__)


def denoiser_of(pipe: Any) -> Any:
    """The module that makes the steps, None in a pipeline that has none by a known name."""
    found = (getattr(pipe, name, None) for name in DENOISERS)
    return next((module for module in found if module is not None), None)


def check_cache(model: Model, checkpoint: Checkpoint) -> None:
    """Refuse a feature cache where it would be wrong. Raises ConfigurationError.

    A cache keeps what the last step's rows were; under step batching they are other samples' rows
    at other steps. `first_block` decides by the mean over all rows, so that an image would depend
    on its neighbours; the others need numbers that only their model's authors have.
    """
    if model.cache is None:
        return
    name = f"cache {model.cache!r}"
    if checkpoint.class_name in FAMILIES:
        raise ConfigurationError(
            f"{name} is lossy and wrong under step batching, by which "
            f"{checkpoint.class_name} is served"
        )
    if model.cache != "taylorseer":
        raise ConfigurationError(f"{name} is not served with batches; 'taylorseer' is")


def enable_cache(denoiser: Any, model: Model) -> None:
    """Switch on the cache that `check_cache` let pass. Raises ConfigurationError."""
    if model.cache is None:
        return
    if not hasattr(denoiser, "enable_cache"):
        raise ConfigurationError(f"cache: {type(denoiser).__name__} takes none")
    denoiser.enable_cache(TaylorSeerCacheConfig(taylor_factors_dtype=denoiser.dtype))


def compile_blocks(denoiser: Any, trial: Callable[[], None]) -> None:
    """Compile each repeated block, once for every shape, and run it once.

    Shapes are static, so that the bits of a picture depend on its bucket and not on which shapes
    the process has seen before. Raises ConfigurationError for a model without repeated blocks,
    and when the compiler fails.
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
    except Exception as error:  # the compiler's errors have no common class
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"compile: {name}: {reason}") from error
    log.info("compiled", denoiser=name)


def run_once(pipeline: Pipeline, model: Model) -> None:
    """Run the denoiser over one prompt, then over two of unequal length, at the default size.

    Raises whatever it raises. That two do not fit the device proves nothing and is not raised.
    """
    alone, other = (_sample(pipeline, model, prompt) for prompt in ("a", "a cat that is longer"))
    pipeline.step([alone])
    if not pipeline.card.joins:
        return
    try:
        pipeline.step([alone, other])
    except OutOfMemory:
        log.info("two samples do not fit", model=model.name)


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
