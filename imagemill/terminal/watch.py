"""`generate --watch`: shows the images above the bar as they are generated.

Draws them with half blocks, two pixels per character, in as many colours as the terminal has. That
works in every terminal, over ssh and inside tmux; `watch_graphics.py` draws better ones if the
terminal supports it. Previews are fetched on a separate thread, so a slow one never delays the bar.
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
from jobs.sheet import shrunk

PAUSE = 1.0
"""Seconds between two rounds of preview requests; workers don't draw previews more often."""

FRAMES = 4
"""Frames per second; a frame is some tens of kilobytes."""

WIDE, NARROW = 24, 16
"""Width of an image in characters, normally and in a low terminal. The height is half of it."""

LOW = 22
"""Rows of a terminal below which the small size is used."""

GAP = 2
EMPTY = "#262626"
MOST = 8
"""Maximum number of images side by side."""

PATIENCE = 0.5


@dataclass(frozen=True, slots=True)
class Tile:
    """An image, or None if there is no preview yet, and the caption below it."""

    picture: Image.Image | None
    caption: str


class Strip:
    """Tiles side by side, as many as fit the width."""

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
    """The width of a tile in characters, and how many tiles fit a terminal of that size."""
    side = min(WIDE if height >= LOW else NARROW, width)
    return side, max(1, min(MOST, (width + GAP) // (side + GAP)))


def _rows(tile: Tile, side: int) -> Iterator[list[Segment]]:
    """The lines of a tile, half as many as it's wide, and its caption."""
    yield from half_blocks(ImageOps.pad(tile.picture or empty_tile(), (side, side)))
    yield [Segment(tile.caption[:side].ljust(side), Style(dim=True))]


def empty_tile() -> Image.Image:
    """The placeholder for an image without a preview."""
    return Image.new("RGB", (8, 8), EMPTY)


def half_blocks(picture: Image.Image) -> Iterator[list[Segment]]:
    """Convert an RGB image of even height to lines of characters, two pixels per character."""
    pixels = picture.convert("RGB").tobytes()
    width = picture.width

    def colour(x: int, y: int) -> Color:
        at = 3 * (y * width + x)
        return Color.from_rgb(*pixels[at : at + 3])

    for y in range(0, picture.height, 2):
        yield [
            Segment("▀", Style(color=colour(x, y), bgcolor=colour(x, y + 1))) for x in range(width)
        ]


class PreviewBar(Bar):
    """The bar with images above it, which stay on the screen when the bar ends."""

    def __init__(self, console: Console, pixels: int = WIDE, frames: float = FRAMES) -> None:
        """`pixels` is the size at which images are kept for drawing."""
        self._console = console
        self._pixels = pixels
        self._news: News | None = None
        self._previews: dict[int, Image.Image] = {}
        self._finished: dict[int, Image.Image] = {}
        super().__init__(console, self._above, frames)
        self._ask: tuple[Client, str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="previews", daemon=True)

    def show_job(self, client: Client, job_id: str) -> None:
        """Set the job whose previews to show."""
        self._ask = client, job_id

    def update(self, news: News) -> None:
        """Update the bar, and the running and finished images."""
        recent = sorted(news.files)[-MOST:]
        for index in recent:
            if index not in self._finished:
                self._finished[index] = _thumbnail(news.files[index], self._pixels)
        for index in self._finished.keys() - recent:
            del self._finished[index]
        for index in self._previews.keys() - {image.index for image in news.running}:
            self._previews.pop(index, None)
        self._news = news
        super().update(news)

    def tiles(self) -> list[Tile]:
        """The running images in order, followed by the most recently finished ones."""
        if self._news is None:
            return []
        room = layout(self._console.width, self._console.height)[1]
        running = [
            Tile(
                self._previews.get(image.index),
                f"#{image.index} step {image.step}/{image.steps}",
            )
            for image in self._visible()
        ]
        newest = list(self._finished.items())[: -1 - room + len(running) : -1]
        return running + [Tile(picture, f"#{index}") for index, picture in newest]

    def _visible(self) -> tuple[Running, ...]:
        """The running images that fit, leaving room for one finished image if there is any."""
        if self._news is None:
            return ()
        room = layout(self._console.width, self._console.height)[1]
        return self._news.running[: room - 1 if self._finished and room > 1 else room]

    def _above(self) -> Iterable[RenderableType]:
        tiles = self.tiles()
        return [Strip(tiles)] if tiles else []

    def _below(self) -> Iterable[RenderableType]:
        """Nothing, because the captions show the running images."""
        return []

    def _run(self) -> None:
        while not self._ended.wait(PAUSE):
            self._round()

    def _round(self) -> None:
        if self._ask is None or self._news is None:
            return
        client, job_id = self._ask
        for index in [image.index for image in self._visible()]:
            try:
                data = client.say(protocol.preview(job_id, index, PATIENCE))
            except (ImagemillError, httpx.HTTPError, Interrupted, RuntimeError):
                return  # following the job reports an unreachable server
            if data is not None and index not in self._finished:
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
        """Print the images once more, so that they stay when the bar is gone."""
        for line in self._above():
            self._console.print(line)


def _picture(data: bytes, pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return shrunk(picture, pixels)


def _thumbnail(path: Path, pixels: int) -> Image.Image:
    with Image.open(path) as picture:
        return shrunk(picture, pixels)
