"""Scenes: random arrangements of things, rendered to pixels.

A scene is one thing, perhaps with a size and a place, or two things in a relation,
on a flat background. Places are distances from the edges, so a scene renders at any
picture size.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from demo.shapes import coverage
from demo.vocabulary import COLORS, HELD_OUT, PALETTE, PLACES, RELATIONS, SHAPES

Pairs = Literal["seen", "held-out", "any"]
Wants = Literal["one", "two", "any"]

JITTER: Final = 0.012
"""How far a thing may be from its exact place, in shorter sides."""

RADII: Final = {None: (0.245, 0.265), "small": (0.135, 0.155), "large": (0.335, 0.36)}
INSETS: Final = {None: 0.28, "small": 0.21, "large": 0.38}
"""Distance of the centre from the nearest edge, in shorter sides."""

PAIR_RADII: Final = (0.18, 0.205)
PAIR_INSET: Final = 0.255


@dataclass(frozen=True)
class Thing:
    """A coloured shape; lengths are in units of the picture's shorter side."""

    color: str
    shape: str
    radius: float
    column: int  # -1 at the left edge, 0 in the middle, 1 at the right edge
    row: int  # -1 at the top edge, 0 in the middle, 1 at the bottom edge
    inset: float
    shift: tuple[float, float] = (0.0, 0.0)

    def center(self, size: tuple[int, int]) -> tuple[float, float]:
        """(x, y) in a picture of (height, width) pixels, in shorter sides."""
        half_height, half_width = (length / min(size) / 2 for length in size)
        x = half_width + self.column * (half_width - self.inset)
        y = half_height + self.row * (half_height - self.inset)
        return x + self.shift[0], y + self.shift[1]


@dataclass(frozen=True)
class Scene:
    """One thing, or two in a `relation` (the first to the second)."""

    background: str
    things: tuple[Thing, ...]
    size_word: str | None = None
    place: str | None = None
    relation: str | None = None


def single(
    background: str, color: str, shape: str, size_word: str | None = None, place: str | None = None
) -> Scene:
    """The scene of one thing, exactly where its words place it."""
    column, row = PLACES[place or "center"]
    low, high = RADII[size_word]
    thing = Thing(color, shape, (low + high) / 2, column, row, INSETS[size_word])
    return Scene(background, (thing,), size_word, place)


def pair(background: str, first: tuple[str, str], relation: str, second: tuple[str, str]) -> Scene:
    """The scene of two (color, shape) things, placed exactly by their relation."""
    column, row = RELATIONS[relation]
    radius = sum(PAIR_RADII) / 2
    things = tuple(
        Thing(color, shape, radius, side * column, side * row, PAIR_INSET)
        for side, (color, shape) in ((1, first), (-1, second))
    )
    return Scene(background, things, relation=relation)


def _pick_kind(rng: random.Random, background: str, pairs: Pairs) -> tuple[str, str]:
    while True:
        kind = rng.choice(COLORS), rng.choice(SHAPES)
        if kind[0] == background:
            continue
        if pairs == "any" or (kind in HELD_OUT) == (pairs == "held-out"):
            return kind


def _wobbled(rng: random.Random, scene: Scene, radii: tuple[float, float]) -> Scene:
    things = tuple(
        Thing(
            thing.color,
            thing.shape,
            rng.uniform(*radii),
            thing.column,
            thing.row,
            thing.inset,
            (rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER)),
        )
        for thing in scene.things
    )
    return Scene(scene.background, things, scene.size_word, scene.place, scene.relation)


def random_scene(rng: random.Random, pairs: Pairs = "seen", wants: Wants = "any") -> Scene:
    """A random scene; with "any" number of things, 45 % have two.

    Small things are drawn more often than large ones, because they're harder.
    """
    background = rng.choice(COLORS) if rng.random() < 0.8 else "white"
    two = rng.random() < 0.45 if wants == "any" else wants == "two"
    first = _pick_kind(rng, background, pairs)
    if two:
        second = first
        while second == first:
            second = _pick_kind(rng, background, pairs)
        scene = pair(background, first, rng.choice(list(RELATIONS)), second)
        return _wobbled(rng, scene, PAIR_RADII)
    size_word = rng.choice((None, None, "small", "small", "large"))
    place = rng.choice((None, None, *PLACES))
    return _wobbled(rng, single(background, *first, size_word, place), RADII[size_word])


def render(scenes: Sequence[Scene], size: tuple[int, int]) -> Tensor:
    """The scenes as pictures: (N, 3, height, width), 0 to 1."""
    palette = {name: torch.tensor(rgb) / 255 for name, rgb in PALETTE.items()}
    pictures = torch.stack([palette[scene.background] for scene in scenes])
    pictures = pictures[:, :, None, None].repeat(1, 1, *size)
    layers: defaultdict[tuple[int, str], list[tuple[int, Thing]]] = defaultdict(list)
    for index, scene in enumerate(scenes):
        for layer, thing in enumerate(scene.things):
            layers[layer, thing.shape].append((index, thing))
    for (_, shape), members in sorted(layers.items(), key=lambda item: item[0]):
        rows = torch.tensor([index for index, _ in members])
        things = [thing for _, thing in members]
        x, y = torch.tensor([thing.center(size) for thing in things]).T
        radius = torch.tensor([thing.radius for thing in things])
        paint = torch.stack([palette[thing.color] for thing in things])[:, :, None, None]
        covered = coverage(shape, size, x, y, radius, None)[:, None]
        pictures[rows] = torch.lerp(pictures[rows], paint.expand(-1, 3, *size), covered)
    return pictures


def render_scatter(count: int, size: tuple[int, int]) -> Tensor:
    """Pictures of up to three shapes of any colour, size and angle, for the VAE.

    Returns (count, 3, height, width), 0 to 1; the shapes may overlap and be cut off.
    Draws from torch's own random numbers.
    """

    def paint(number: int) -> Tensor:
        colors = torch.tensor([PALETTE[name] for name in COLORS]) / 255
        named = colors[torch.randint(len(COLORS), (number,))]
        odd = torch.rand(number, 1) < 0.3
        return torch.where(odd, torch.rand(number, 3), named)[:, :, None, None]

    pictures = paint(count).repeat(1, 1, *size)
    for chance in (1.0, 0.7, 0.4):
        drawn = torch.randint(len(SHAPES), (count,))
        present = torch.rand(count) < chance
        for number, shape in enumerate(SHAPES):
            rows = ((drawn == number) & present).nonzero()[:, 0]
            if not len(rows):
                continue
            some = len(rows)
            angle = torch.where(torch.rand(some) < 0.5, 0.0, (torch.rand(some) - 0.5) * 6.28)
            radius = torch.rand(some) ** 1.3 * 0.55 + 0.12
            covered = coverage(shape, size, torch.rand(some), torch.rand(some), radius, angle)[
                :, None
            ]
            pictures[rows] = torch.lerp(pictures[rows], paint(some).expand(-1, 3, *size), covered)
    return pictures
