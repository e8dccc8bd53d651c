"""Decide whether a served picture equals diffusers' own: it may only differ by rounding.

Kernels add in a different order on other processors and for other numbers of rows, so the same
arithmetic gives slightly different pictures. How different depends on the processor, the dtype, the
scheduler and the weights, so no fixed tolerance is right. Instead the tolerance is measured on the
machine that runs the test: diffusers draws the same picture `DRAWS` more times, as one batch, while
every linear and convolution layer randomly rounds its input and output once more.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from jobs.request import ImageRequest
from pipelines.seam import Pipeline
from tests.pipelines.serving import alone, difference

DRAWS = 4
"""Pictures drawn with extra rounding; the largest difference counts."""

FACTOR = 4.0
"""Tolerance as a multiple of that difference; the largest seen for a correct picture is 1.0."""

FLOOR = 8 * torch.finfo(torch.float32).eps
"""Difference that's always allowed, because pixels are float32 up to 1."""

LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
"""Layers that sum many products, where the order of additions matters."""

Draw = Callable[[int], torch.Tensor]
"""Number of copies -> pictures of one request, [copies, 3, height, width]."""


class Reference:
    """A picture, and the tolerance for it on this machine.

    `draw` must return the same pictures on every call. `modules` are the models it runs. `dtype` is
    set for a picture that's served in a coarser dtype than the reference's.
    """

    def __init__(
        self, draw: Draw, modules: Iterable[torch.nn.Module], dtype: torch.dtype | None = None
    ) -> None:
        self._draw, self._modules, self._dtype = draw, list(modules), dtype
        self.picture = _on_cpu(draw(1)[0])

    @cached_property
    def allowed(self) -> float:
        """The largest difference of any pixel that counts as rounding."""
        with rounding_once_more(self._modules, self._dtype):
            pictures = self._draw(DRAWS)
        moved = [difference(_on_cpu(picture), self.picture) for picture in pictures]
        return FLOOR + FACTOR * max(moved)

    def miss(self, pixels: torch.Tensor) -> float:
        """The largest difference of any pixel, relative to the tolerance; correct up to 1.0."""
        change = difference(pixels, self.picture)
        return 0.0 if change <= FLOOR else change / self.allowed


def served_alone(pipeline: Pipeline, request: ImageRequest, bucket: int = 0) -> Reference:
    """The picture that our own pipeline makes if the request is served alone.

    This is for pictures that diffusers can't make. The prompt's embeddings are cached at the first
    draw, so the extra rounding starts after the text encoders.
    """
    family: Any = getattr(pipeline, "family", None)
    modules = modules_of(family.pipe) if family is not None else []

    def draw(copies: int) -> torch.Tensor:
        return torch.stack([alone(pipeline, request, bucket) for _ in range(copies)])

    return Reference(draw, modules)


def modules_of(pipe: Any) -> list[torch.nn.Module]:
    """The models of a diffusers pipeline."""
    return [c for c in pipe.components.values() if isinstance(c, torch.nn.Module)]


@contextmanager
def rounding_once_more(
    modules: Iterable[torch.nn.Module], dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Change every value that enters or leaves a layer by up to half a unit in the last place.

    The unit is that of the value's own dtype, or of `dtype` if that's coarser.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(value: torch.Tensor) -> torch.Tensor:
        unit = max(torch.finfo(kind).eps for kind in (value.dtype, dtype or value.dtype))
        noise = unit * (torch.rand(value.shape, generator=generator) - 0.5)
        return (value * (1 + noise.to(value.device))).to(value.dtype)

    def before(_: torch.nn.Module, inputs: Any) -> Any:
        return moved(inputs[0]), *inputs[1:]

    def after(_: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return moved(output)

    layers = [m for module in modules for m in module.modules() if isinstance(m, LAYERS)]
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _on_cpu(picture: torch.Tensor) -> torch.Tensor:
    return picture.float().cpu()
