"""The self-check of a sharded denoiser: its forward passes against a single device's.

`record` runs a family's real path over the whole transformer, before it is sharded, and keeps
what went in and came out; `compare` puts the same through the sharded one. A rank with other
weights, a mask that is lost, shards in the wrong order: all show here, before any image is made.

What may differ is rounding, since shards add in another order. How much that is depends on dtype
and depth, and on what the weights make of it, so it is not guessed but measured: the whole
transformer runs a second time with every layer's output rounded once more, at random.
Knows no ranks and no families.
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
from pipelines.placements.leader import Facade

ROUNDINGS = 3.0
"""How many times what rounding was measured to do a row may differ by.

Right groups of tiny models differ by at most 0.8 times that in bfloat16, lost masks by 7 times."""

FLOOR = 1e-4
"""What a row may always differ by, of its norm; 1e-6 is usual in float32."""

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
"""What is rounded again: where a model does its sums."""

CHUNK = 2**22
"""Values that are rounded again at a time, or a row: the check shall not be what fills a device."""

GUIDANCE = 3.0
"""A scale that makes every family with classifier-free guidance run two rows."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reference:
    """One forward pass of a whole transformer: what went in and what came out, row by row.

    `rounding` is how far each row came out elsewhere when rounded once more, of its norm.
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


class Recorder(Facade):
    """A transformer that keeps what it was asked and what it answered.

    It may be elsewhere than the rest of the model: at `place`, answering to `device`.
    """

    def __init__(self, behind: torch.nn.Module, place: torch.device, device: torch.device) -> None:
        super().__init__(behind)
        self.place, self.device = place, device
        self.passes: list[Reference] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's own answer."""
        there_args, there_kwargs = _moved((args, kwargs), self.place)
        output = self.behind(*there_args, **there_kwargs)
        with _rounded_again(self.behind):
            again = self.behind(*there_args, **there_kwargs)
        rounding = [_apart(*rows) for rows in zip(_rows(output), _rows(again), strict=True)]
        output = _moved(output, self.device)
        self.passes.append(Reference(args, kwargs, _rows(output), rounding))
        return output


def record(
    placed: FamilyPipeline,
    model: Model,
    place: torch.device | None = None,
    device: torch.device | None = None,
) -> References:
    """One forward pass of the whole transformer for a plain image, and one for a guided image.

    A guided one has a negative prompt of another length, so that rows are padded under a mask
    where the family does that. A transformer that fits no device is run where it was loaded, at
    `place`, with the rest of the model on `device`. Raises whatever the pass raises, OutOfMemory
    among them.
    """
    pipe = placed.family.pipe
    name = next(name for name in DENOISERS if getattr(pipe, name, None) is not None)
    whole = getattr(pipe, name)
    place = place or whole.device
    recorder = Recorder(whole, place, device or place)
    setattr(pipe, name, recorder)
    try:
        for request in trials(placed, model):
            [conditioning] = placed.encode([request])
            placed.step([placed.start(request, conditioning)])
    finally:
        setattr(pipe, name, whole)
    return References(_request(placed, model), tuple(recorder.passes))


def trials(placed: FamilyPipeline, model: Model) -> list[ImageRequest]:
    """The requests that `record` runs a step of."""
    guided = _request(placed, model)
    plain = replace(guided, guidance_scale=0.0)
    return [plain, guided] if placed.rows(guided) > 1 else [guided]


def compare(references: References, sharded: torch.nn.Module) -> None:
    """Put the same through the sharded transformer.

    Raises ConfigurationError saying what differs and by how much, and GroupLost when a rank fails.
    """
    for reference in references.passes:
        with torch.inference_mode():
            found = _rows(sharded(*reference.args, **reference.kwargs))
        _check(reference, found)


def _check(reference: Reference, found: list[torch.Tensor]) -> None:
    expected = reference.output
    rows = len(expected)
    shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in found]
    if shapes[0] != shapes[1]:
        raise ConfigurationError(
            f"the sharded denoiser answers {rows} rows of shape {shapes[0][0]} "
            f"with {len(found)} of {shapes[1][:1]}"
        )
    pairs = zip(expected, found, reference.rounding, strict=True)
    for row, (one, other, rounding) in enumerate(pairs, 1):
        relative, allowed = _apart(one, other), max(FLOOR, ROUNDINGS * rounding)
        log.info("compared with the whole", row=row, relative=relative, allowed=allowed)
        if not relative <= allowed:  # NaN too
            raise ConfigurationError(
                f"the sharded denoiser is wrong: in row {row} of {rows} its output differs from "
                f"the whole one's by {relative:.2g} of its norm, where rounding in {one.dtype} "
                f"allows {allowed:.2g}"
            )


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """How large the difference's norm is beside that of `one`."""
    exact = one.double().cpu()
    return float((exact - other.double().cpu()).norm() / exact.norm())


@contextmanager
def _rounded_again(module: torch.nn.Module) -> Iterator[None]:
    """Move every layer's output by up to half a unit in the last place inside the block."""
    while isinstance(module, Facade):
        module = module.behind
    layers = [inner for inner in module.modules() if isinstance(inner, LAYERS)]
    hooks = [layer.register_forward_hook(_round_again) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round_again(_: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
    unit = torch.finfo(output.dtype).eps
    for part in torch.split(output, max(1, CHUNK * len(output) // max(1, output.numel()))):
        part.mul_(1 + unit * (torch.rand_like(part, dtype=torch.float32) - 0.5))


def _request(placed: FamilyPipeline, model: Model) -> ImageRequest:
    """An image of the default size, on the grid; reproducible, which pads the most."""
    defaults, grid = model.defaults, placed.card.multiple
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
    """The same with its tensors at `place`; they are as they were where they are there already."""
    if isinstance(value, torch.Tensor):
        return value.to(place)
    if isinstance(value, dict):
        return {name: _moved(each, place) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, place) for each in value)
    return value


def _rows(output: Any) -> list[torch.Tensor]:
    """A transformer's output, `return_dict=False`, row by row."""
    return list(output[0])
