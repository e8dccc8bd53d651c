"""The judge: reads background, colours, shapes and places from a picture's pixels.

It doesn't judge edges or exact sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from demo.scenes import Scene, Thing
from demo.shapes import coverage
from demo.vocabulary import COLORS, PALETTE, RELATIONS, SHAPES

Pixels = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

SAME_COLOR: Final = 40.0
"""RGB distance below which a pixel belongs to the background."""

LEAST_AREA: Final = 0.006
"""A thing covers at least this share of the picture."""

PLACE_TOLERANCE: Final = 0.1
"""How far a thing may be from its place, in shorter sides."""

TEMPLATE_SIDE: Final = 48


@dataclass(frozen=True)
class Verdict:
    """Which attributes of a picture are right."""

    background: bool
    color: bool
    shape: bool
    position: bool

    @property
    def everything(self) -> bool:
        return self.background and self.color and self.shape and self.position


def judge(picture: Image.Image, scene: Scene) -> Verdict:
    """Compare a picture with its prompt's scene."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.float64)
    frame = np.concatenate([pixels[:3], pixels[-3:]], axis=None).reshape(-1, 3)
    sides = np.concatenate([pixels[:, :3], pixels[:, -3:]], axis=1).reshape(-1, 3)
    background = np.median(np.concatenate([frame, sides]), axis=0)
    foreground = np.sqrt(((pixels - background) ** 2).sum(-1)) > SAME_COLOR
    seen = [_judge_thing(pixels, part, thing) for part, thing in _parts(foreground, scene)]
    return Verdict(
        nearest_color(background) == scene.background,
        *(all(answers) for answers in zip(*seen, strict=True)),
    )


def _parts(foreground: Mask, scene: Scene) -> list[tuple[Mask, Thing]]:
    """Each thing with the foreground of its half of the picture, or of the whole picture."""
    if scene.relation is None:
        return [(foreground, scene.things[0])]
    axis = 1 if RELATIONS[scene.relation][0] else 0
    middle = foreground.shape[axis] // 2
    place = np.arange(foreground.shape[axis])
    halves = []
    for thing in scene.things:
        half = place < middle if (thing.column, thing.row)[1 - axis] < 0 else place >= middle
        halves.append((foreground & (half if axis else half[:, None]), thing))
    return halves


def _judge_thing(pixels: Pixels, part: Mask, thing: Thing) -> tuple[bool, bool, bool]:
    """(color, shape, position) of the largest patch in a foreground."""
    patch = largest_patch(part)
    if patch.sum() < LEAST_AREA * patch.size:
        return False, False, False
    color = nearest_color(np.median(pixels[patch], axis=0)) == thing.color
    whole = part.sum() < 1.4 * patch.sum() + 30  # no other large patch
    shape = whole and nearest_shape(patch) == thing.shape
    top, bottom, left, right = _bounds(patch)
    side = min(patch.shape)
    x, y = thing.center((patch.shape[0], patch.shape[1]))
    away = max(abs((left + right) / 2 / side - x), abs((top + bottom) / 2 / side - y))
    return color, shape, away < PLACE_TOLERANCE


def nearest_color(rgb: Pixels) -> str:
    distances = [((np.array(PALETTE[name]) - rgb) ** 2).sum() for name in COLORS]
    return COLORS[int(np.argmin(distances))]


def nearest_shape(patch: Mask) -> str:
    """The shape whose template overlaps the patch best, both scaled to the same box."""
    scaled = _boxed(patch)
    overlaps = [(scaled & template).sum() / (scaled | template).sum() for template in _TEMPLATES]
    return SHAPES[int(np.argmax(overlaps))]


def largest_patch(mask: Mask) -> Mask:
    """The largest set of pixels that touch by their sides; all False if the mask is empty."""
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape) + 1, 0)
    before = np.zeros_like(labels)
    while (labels != before).any():  # spread the highest label through each patch
        before, edged = labels, np.pad(labels, 1)
        neighbours = (edged[:-2, 1:-1], edged[2:, 1:-1], edged[1:-1, :-2], edged[1:-1, 2:])
        labels = np.maximum.reduce([labels, *neighbours]) * mask
    if not mask.any():
        return mask
    names, sizes = np.unique(labels[mask], return_counts=True)
    largest: Mask = labels == names[sizes.argmax()]
    return largest


def _bounds(mask: Mask) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the True pixels; bottom and right are past the end."""
    rows, columns = np.where(mask)
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def _boxed(mask: Mask) -> Mask:
    """The patch centred in a square and scaled to the templates' size."""
    top, bottom, left, right = _bounds(mask)
    height, width = bottom - top, right - left
    side = max(height, width)
    box = np.zeros((side, side), np.uint8)
    above, before = (side - height) // 2, (side - width) // 2
    box[above : above + height, before : before + width] = mask[top:bottom, left:right] * 255
    size = (TEMPLATE_SIDE, TEMPLATE_SIDE)
    scaled = Image.fromarray(box).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(scaled) > 127


def _template(shape: str) -> Mask:
    middle, radius = torch.tensor([0.5]), torch.tensor([0.36])
    covered = coverage(shape, (192, 192), middle, middle, radius, None)[0]
    return _boxed((covered > 0.5).numpy())


_TEMPLATES: Final = tuple(_template(shape) for shape in SHAPES)
