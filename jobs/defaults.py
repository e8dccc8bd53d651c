"""A model's own defaults, put where its entry sets none.

A worker derives them from the model's folder and publishes them in the model's card; the service
takes them from there. The entry's `defaults` win field by field.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from jobs.catalog import SMALLEST_SIDE, Defaults, Limits, Model


def with_own_defaults(model: Model, own: Defaults) -> Model:
    """The model with every default that its entry leaves open taken from `own`.

    What the entry's limits don't allow is brought within them: a caller who gives nothing but a
    prompt must be served.
    """
    within = asdict(_within(own, model.limits))
    taken = {name: within[name] for name in model.unset}
    return replace(model, defaults=replace(model.defaults, **taken), unset=())


def to_publish(entry: Model, model: Model) -> dict[str, Any]:
    """What a card says of the defaults of `model`, which is `entry` with its own defaults.

    Only what the entry leaves open, and of which folder, so that nothing is used for another.
    """
    return {
        "source": entry.source,
        "defaults": {name: getattr(model.defaults, name) for name in entry.unset},
    }


def as_published(model: Model, card: Mapping[str, Any] | None) -> Model:
    """The model with the defaults of its card; those that it doesn't tell stay unset."""
    if not model.unset or card is None or card.get("source") != model.source:
        return model
    told = {name: value for name, value in card.get("defaults", {}).items() if name in model.unset}
    unset = tuple(name for name in model.unset if name not in told)
    return replace(model, defaults=replace(model.defaults, **told), unset=unset)


def _within(own: Defaults, limits: Limits) -> Defaults:
    width, height = own.width, own.height
    if limits.sizes and (width, height) not in limits.sizes:
        width, height = limits.sizes[0]
    shrink = min(1.0, math.sqrt(limits.max_pixels / (width * height)))
    return replace(
        own,
        width=_side(width * shrink, limits.multiple),
        height=_side(height * shrink, limits.multiple),
        steps=min(own.steps, limits.max_steps),
        guidance_scale=min(own.guidance_scale, limits.max_guidance_scale),
    )


def _side(pixels: float, multiple: int) -> int:
    """The nearest side that is allowed and not longer."""
    smallest = -(-SMALLEST_SIDE // multiple) * multiple
    return max(smallest, int(pixels) // multiple * multiple)
