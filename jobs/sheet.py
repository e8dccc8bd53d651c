"""Contact sheets: a grid of equal cells, and pictures that fit into them."""

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps


@dataclass(frozen=True, slots=True)
class Grid:
    """`count` cells of `width` x `height` pixels in rows, with `gap` pixels around each."""

    count: int
    columns: int
    width: int
    height: int
    gap: int

    def blank(self) -> Image.Image:
        """A white page for all cells."""
        rows = math.ceil(self.count / self.columns)
        size = (self._start(self.columns, self.width), self._start(rows, self.height))
        return Image.new("RGB", size, "white")

    def place(self, position: int) -> tuple[int, int]:
        """The left and top of a cell, counted from 0, row by row."""
        row, column = divmod(position, self.columns)
        return self._start(column, self.width), self._start(row, self.height)

    def _start(self, number: int, length: int) -> int:
        """Where cell `number` of this length begins, or the page ends."""
        return self.gap + number * (length + self.gap)


def fitted(path: Path, side: int) -> Image.Image:
    """A file's picture in RGB, shrunk or enlarged so that its longer side has `side` pixels."""
    with Image.open(path) as picture:
        return ImageOps.contain(_drafted(picture, side), (side, side))


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """An open picture in RGB, shrunk so that its longer side has at most `side` pixels."""
    small = _drafted(picture, side)
    small.thumbnail((side, side))
    return small


def _drafted(picture: Image.Image, side: int) -> Image.Image:
    picture.draft("RGB", (side, side))  # decodes a JPEG at a smaller size, which is faster
    return picture.convert("RGB")
