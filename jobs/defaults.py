"""A model's own defaults, used for what its catalog entry leaves open.

A worker derives them from the model's folder and publishes them in the model's card, where the
service reads them. The entry's `defaults` take precedence, field by field.
"""

import math
from dataclasses import asdict, replace

from jobs.catalog import SMALLEST_SIDE, Defaults, Limits, Model
from jobs.reports import ModelCard


def with_own_defaults(model: Model, own: Defaults) -> Model:
    """The model, with every default that its entry leaves open taken from `own`.

    Values are clamped to the entry's limits, because a request with nothing but a prompt must work.
    """
    within = asdict(_within(own, model.limits))
    values = {name: within[name] for name in model.unset}
    return replace(model, defaults=replace(model.defaults, **values), unset=())


def to_publish(entry: Model, model: Model) -> ModelCard:
    """A card with only the defaults of `model`, which is `entry` with its own defaults.

    It holds what the entry leaves open, and which weights it's for, so that nobody uses it for
    different ones.
    """
    return ModelCard(
        source=entry.source,
        defaults={name: getattr(model.defaults, name) for name in entry.unset},
    )


def as_published(model: Model, card: ModelCard | None) -> Model:
    """The model, with the defaults in its card; those that the card doesn't have stay unset."""
    if not model.unset or card is None or card.source != model.source:
        return model
    values = {name: value for name, value in card.defaults.items() if name in model.unset}
    unset = tuple(name for name in model.unset if name not in values)
    return replace(model, defaults=replace(model.defaults, **values), unset=unset)


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
    """The largest allowed side that isn't longer than `pixels`."""
    smallest = -(-SMALLEST_SIDE // multiple) * multiple
    return max(smallest, int(pixels) // multiple * multiple)
