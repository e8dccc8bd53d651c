"""`generate --watch`: the pictures in the terminal while they become, above the bar.

Drawn with half blocks, two pixels a character, in the terminal's own colours (24 bits, or what it
has): that works in every terminal, over ssh and inside tmux. `painted.py` draws better ones where
it can. Previews are asked for on a thread of their own, so that a slow one never holds the bar up.
Knows no job beyond what `News` tells.
"""

import io
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
from PIL import Image, ImageOps
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style

from imagemill.client import protocol
from imagemill.client.clients import Client
from imagemill.commands.follow import News, Running
from imagemill.terminal.interrupts import Interrupted
from imagemill.terminal.progress import Bar
from jobs.errors import ImagemillError

PAUSE = 1.0
"""Seconds between two rounds of questions for previews; a worker draws no faster."""

FRAMES = 4
"""Frames a second: one is some tens of kilobytes."""

WIDE, NARROW = 24, 16
"""Characters across a picture, and where the terminal is low; it is half as many high."""

LOW = 22
"""Rows of a terminal under which the small size is used."""

GAP = 2
EMPTY = "#262626"
MOST = 8
"""Pictures side by side, however wide the terminal is."""

PATIENCE = 0.5


@dataclass(frozen=True, slots=True)
class Tile:
    """A picture, or None while nothing can be seen of it, and what stands below."""

    picture: Image.Image | None
    caption: str


class Strip:
    """Tiles side by side, as many as the width takes."""

    def __init__(self, tiles: list[Tile]) -> None:
        self._tiles = tiles

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        side, count = layout(options.max_width, console.height)
        columns = [list(_rows(tile, side)) for tile in self._tiles[:count]]
        for row in range(side // 2 + 1):
            for place, column in enumerate(columns):
                if place:
                    yield Segment(" " * GAP)
                yield from column[row]
            yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(NARROW, options.max_width)


def layout(width: int, height: int) -> tuple[int, int]:
    """Characters across a tile, and how many tiles a terminal of that size takes."""
    side = min(WIDE if height >= LOW else NARROW, width)
    return side, max(1, min(MOST, (width + GAP) // (side + GAP)))


def _rows(tile: Tile, side: int) -> Iterator[list[Segment]]:
    """The lines of a tile: half as many as it is wide, and the caption."""
    yield from half_blocks(ImageOps.pad(tile.picture or empty_tile(), (side, side)))
    yield [Segment(tile.caption[:side].ljust(side), Style(dim=True))]


def empty_tile() -> Image.Image:
    """What is shown while nothing can be seen of a picture."""
    return Image.new("RGB", (8, 8), EMPTY)


def half_blocks(picture: Image.Image) -> Iterator[list[Segment]]:
    """RGB of an even height as lines of characters, each the upper pixel over the lower one."""
    pixels = picture.convert("RGB").tobytes()
    width = picture.width

    def colour(x: int, y: int) -> Color:
        at = 3 * (y * width + x)
        return Color.from_rgb(*pixels[at : at + 3])

    for y in range(0, picture.height, 2):
        yield [
            Segment("▀", Style(color=colour(x, y), bgcolor=colour(x, y + 1))) for x in range(width)
        ]


class Watched(Bar):
    """The bar with the pictures above it; they stay when the bar goes."""

    def __init__(self, console: Console, pixels: int = WIDE, frames: float = FRAMES) -> None:
        """`pixels` is how large a picture is kept for drawing."""
        self._console = console
        self._pixels = pixels
        self._news: News | None = None
        self._previews: dict[int, Image.Image] = {}
        self._made: dict[int, Image.Image] = {}
        super().__init__(console, self._above, frames)
        self._ask: tuple[Client, str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="previews", daemon=True)

    def look_at(self, client: Client, job_id: str) -> None:
        """Whose previews to show."""
        self._ask = client, job_id

    def update(self, news: News) -> None:
        """Move the bar, and take up what is running and what is made."""
        recent = sorted(news.files)[-MOST:]
        for index in recent:
            if index not in self._made:
                self._made[index] = _thumbnail(news.files[index], self._pixels)
        for index in self._made.keys() - recent:
            del self._made[index]
        for index in self._previews.keys() - {image.index for image in news.running}:
            self._previews.pop(index, None)
        self._news = news
        super().update(news)

    def tiles(self) -> list[Tile]:
        """What runs, in its order, and at the end of the row the newest of what is made."""
        if self._news is None:
            return []
        room = layout(self._console.width, self._console.height)[1]
        running = [
            Tile(
                self._previews.get(image.index),
                f"#{image.index} step {image.step}/{image.steps}",
            )
            for image in self._looked_at()
        ]
        newest = list(self._made.items())[: -1 - room + len(running) : -1]
        return running + [Tile(picture, f"#{index}") for index, picture in newest]

    def _looked_at(self) -> tuple[Running, ...]:
        """The running images that are shown: all that fit, but for one place for what is made."""
        if self._news is None:
            return ()
        room = layout(self._console.width, self._console.height)[1]
        return self._news.running[: room - 1 if self._made and room > 1 else room]

    def _above(self) -> Iterable[RenderableType]:
        tiles = self.tiles()
        return [Strip(tiles)] if tiles else []

    def _below(self) -> Iterable[RenderableType]:
        """Nothing: the captions tell of the running images."""
        return []

    def _run(self) -> None:
        while not self._ended.wait(PAUSE):
            self._round()

    def _round(self) -> None:
        if self._ask is None or self._news is None:
            return
        client, job_id = self._ask
        for index in [image.index for image in self._looked_at()]:
            try:
                data = client.say(protocol.preview(job_id, index, PATIENCE))
            except (ImagemillError, httpx.HTTPError, Interrupted, RuntimeError):
                return  # the job's own looks tell of a server that is away
            if data is not None and index not in self._made:
                self._previews[index] = _picture(data, self._pixels)
            if self._ended.is_set():
                return

    def __enter__(self) -> Self:
        super().__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        super().__exit__()
        self._thread.join(2)
        self._leave()

    def _leave(self) -> None:
        """What stays when the bar has gone."""
        for line in self._above():
            self._console.print(line)


def _picture(data: bytes, pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return _small(picture, pixels)


def _thumbnail(path: Path, pixels: int) -> Image.Image:
    with Image.open(path) as picture:
        return _small(picture, pixels)


def _small(picture: Image.Image, pixels: int) -> Image.Image:
    """No larger than a tile: what is drawn again and again should be little."""
    picture.draft("RGB", (pixels, pixels))
    flat = picture.convert("RGB")
    flat.thumbnail((pixels, pixels))
    return flat
