"""The self-check of a sharded transformer: its forward passes against a single device's.

`record` runs a family's real path over the whole transformer, before it is sharded, and keeps
what went in and came out; `compare` puts the same through the sharded one. A rank with other
weights, a mask that is lost, shards in the wrong order: all show here, before any image is made.
Knows no ranks and no families.
"""

from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from jobs.request import ImageRequest
from pipelines.placements.lead import Facade
from pipelines.placements.placed import Placed

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How large the difference's norm may be beside the output's, by dtype.

Shards add in another order: that is rounding, about 1e-6 in float32 and 1e-2 through the layers
of a large model in bfloat16. Anything wrong is of the output's own size.
"""

GUIDANCE = 3.0
"""A scale that makes every family with classifier-free guidance run two rows."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reference:
    """One forward pass of a whole transformer: what went in and what came out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: list[torch.Tensor]


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
        output = _moved(self.behind(*there_args, **there_kwargs), self.device)
        self.passes.append(Reference(args, kwargs, _rows(output)))
        return output


def record(
    placed: Placed,
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
    whole = pipe.transformer
    place = place or whole.device
    recorder = Recorder(whole, place, device or place)
    plain = _request(placed, model)
    asked = [replace(plain, guidance_scale=0.0), replace(plain, guidance_scale=GUIDANCE)]
    pipe.transformer = recorder
    try:
        for request in asked if placed.rows(asked[1]) > 1 else asked[1:]:
            [conditioning] = placed.encode([request])
            placed.step([placed.start(request, conditioning)])
    finally:
        pipe.transformer = whole
    return References(plain, tuple(recorder.passes))


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
            f"the group's transformer answers {rows} rows of shape {shapes[0][0]} "
            f"with {len(found)} of {shapes[1][:1]}"
        )
    pairs = list(zip(expected, found, strict=True))
    differences = torch.cat([(a.double().cpu() - b.double().cpu()).flatten() for a, b in pairs])
    norm = torch.cat([a.double().cpu().flatten() for a, _ in pairs]).norm()
    relative, largest = float(differences.norm() / norm), float(differences.abs().max())
    tolerance = TOLERANCES[expected[0].dtype]
    log.info("compared with one device", rows=rows, relative=relative, largest=largest)
    if not relative <= tolerance:  # NaN too
        raise ConfigurationError(
            f"the group's transformer is wrong: over {rows} rows its output differs from a single "
            f"device's by {relative:.2g} of its norm and {largest:.2g} at most, where "
            f"{tolerance:g} of the norm is allowed for {expected[0].dtype}"
        )


def _request(placed: Placed, model: Model) -> ImageRequest:
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
