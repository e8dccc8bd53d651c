"""The self-check of a sharded denoiser: its forward passes against a single device's.

`record` runs a family's real path over the whole transformer, before it's sharded, and keeps the
inputs and outputs; `compare` runs the same inputs through the sharded one. A rank with other
weights, a lost mask or shards in the wrong order show up here, before any image is made.

Only rounding may differ, because shards are summed in another order. How much rounding changes
depends on dtype, depth and the weights, so it's measured: the whole transformer runs a second time
with every layer's output rounded once more, at random. Has no code for ranks or families.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from jobs.request import ImageRequest
from pipelines.loading.components import DENOISERS
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.leader import ModuleProxy

ROUNDINGS = 3.0
"""A row may differ by this many times its measured rounding.

In bfloat16, correct groups of tiny models differ by at most 0.8 times, lost masks by 7 times."""

FLOOR = 1e-4
"""A row may always differ by this part of its norm; 1e-6 is usual in float32."""

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
"""Layers whose outputs are rounded again, because that's where a model sums."""

CHUNK = 2**22
"""Values rounded again at a time, at least one row, so the check itself doesn't fill a device."""

GUIDANCE = 3.0
"""A scale at which every family with classifier-free guidance runs two rows."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reference:
    """One forward pass of a whole transformer: its arguments and its output, row by row.

    `rounding` is how far each row moved when rounded once more, as a part of its norm.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: list[torch.Tensor]
    rounding: list[float]


@dataclass(frozen=True, slots=True)
class References:
    """Forward passes for one image of the entry's default size, `request`."""

    request: ImageRequest
    passes: tuple[Reference, ...]


class Recorder(ModuleProxy):
    """A transformer that records its arguments and outputs.

    It may be on another device than the rest of the model: it runs on `place`, and its outputs go
    to `device`.
    """

    def __init__(self, behind: torch.nn.Module, place: torch.device, device: torch.device) -> None:
        super().__init__(behind)
        self.place, self.device = place, device
        self.passes: list[Reference] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer twice, the second time to measure rounding; returns the first."""
        moved_args, moved_kwargs = _moved((args, kwargs), self.place)
        output = self.behind(*moved_args, **moved_kwargs)
        with _rounded_again(self.behind):
            rounded = self.behind(*moved_args, **moved_kwargs)
        rounding = [_difference(*rows) for rows in zip(_rows(output), _rows(rounded), strict=True)]
        output = _moved(output, self.device)
        self.passes.append(Reference(args, kwargs, _rows(output), rounding))
        return output


def record(
    pipeline: FamilyPipeline,
    model: Model,
    place: torch.device | None = None,
    device: torch.device | None = None,
) -> References:
    """Record one forward pass of the whole transformer without guidance, and one with it.

    The guided request has a negative prompt of another length, so that families with masks pad
    its rows. A transformer too large for any device runs where it was loaded, on `place`, with the
    rest of the model on `device`. Raises whatever the pass raises, including OutOfMemory.
    """
    pipe = pipeline.family.pipe
    name = next(name for name in DENOISERS if getattr(pipe, name, None) is not None)
    whole = getattr(pipe, name)
    place = place or whole.device
    recorder = Recorder(whole, place, device or place)
    setattr(pipe, name, recorder)
    try:
        for request in trials(pipeline, model):
            [conditioning] = pipeline.encode([request])
            pipeline.step([pipeline.start(request, conditioning)])
    finally:
        setattr(pipe, name, whole)
    return References(_request(pipeline, model), tuple(recorder.passes))


def trials(pipeline: FamilyPipeline, model: Model) -> list[ImageRequest]:
    """The requests of which `record` runs one step each."""
    guided = _request(pipeline, model)
    plain = replace(guided, guidance_scale=0.0)
    return [plain, guided] if pipeline.rows(guided) > 1 else [guided]


def compare(references: References, sharded: torch.nn.Module) -> None:
    """Run the recorded arguments through the sharded transformer and compare the outputs.

    Raises ConfigurationError with what differs and by how much, and GroupLost if a rank fails.
    """
    for reference in references.passes:
        with torch.inference_mode():
            output = _rows(sharded(*reference.args, **reference.kwargs))
        _check(reference, output)


def _check(reference: Reference, output: list[torch.Tensor]) -> None:
    expected = reference.output
    rows = len(expected)
    shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in output]
    if shapes[0] != shapes[1]:
        raise ConfigurationError(
            f"the sharded denoiser returns {len(output)} rows of shape {shapes[1][:1]} "
            f"instead of {rows} of {shapes[0][:1]}"
        )
    pairs = zip(expected, output, reference.rounding, strict=True)
    # Row by row: a single wrong row, such as the padded negative prompt's, would hardly show in
    # the norm of a whole batch. Relative to the row's own norm, so the scale of outputs, which
    # differs between models, doesn't matter.
    for row, (whole, sharded, rounding) in enumerate(pairs, 1):
        relative, allowed = _difference(whole, sharded), max(FLOOR, ROUNDINGS * rounding)
        log.info("compared with the whole", row=row, relative=relative, allowed=allowed)
        if not relative <= allowed:  # NaN too
            raise ConfigurationError(
                f"the sharded denoiser is wrong: in row {row} of {rows} its output differs from "
                f"the whole one's by {relative:.2g} of its norm, but rounding in {whole.dtype} "
                f"allows only {allowed:.2g}"
            )


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The norm of the difference, relative to that of `expected`."""
    # In float64 on the CPU, so that summing the squares adds no rounding of its own.
    exact = expected.double().cpu()
    return float((exact - actual.double().cpu()).norm() / exact.norm())


@contextmanager
def _rounded_again(module: torch.nn.Module) -> Iterator[None]:
    """Change every layer's output by up to half a unit in its last place, within the block.

    As another order of summation would, at every layer, so the effect grows with depth in the
    same way.
    """
    while isinstance(module, ModuleProxy):
        module = module.behind
    layers = [inner for inner in module.modules() if isinstance(inner, LAYERS)]
    hooks = [layer.register_forward_hook(_round_again) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round_again(_: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
    # In place and in chunks, because activations of a large image leave no room for a copy.
    unit = torch.finfo(output.dtype).eps
    for part in torch.split(output, max(1, CHUNK * len(output) // max(1, output.numel()))):
        part.mul_(1 + unit * (torch.rand_like(part, dtype=torch.float32) - 0.5))


def _request(pipeline: FamilyPipeline, model: Model) -> ImageRequest:
    """An image of the default size, on the grid. Reproducible requests are padded the most."""
    defaults, grid = model.defaults, pipeline.card.multiple
    return ImageRequest(
        model=model.name,
        prompt="a lighthouse on a cliff above the sea at dawn",
        negative_prompt="blurry",
        seed=0,
        width=defaults.width - defaults.width % grid,
        height=defaults.height - defaults.height % grid,
        steps=2,
        guidance_scale=GUIDANCE,
        reproducible=True,
    )


def _moved(value: Any, place: torch.device) -> Any:
    """The value with its tensors on `place`; tensors already there aren't copied."""
    if isinstance(value, torch.Tensor):
        return value.to(place)
    if isinstance(value, dict):
        return {name: _moved(item, place) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, place) for item in value)
    return value


def _rows(output: Any) -> list[torch.Tensor]:
    """A transformer's output with `return_dict=False`, row by row."""
    return list(output[0])
