"""`generate --watch` with real pictures, by a protocol of the terminal's.

Erasing a line of text erases the pictures on it, and rich erases all lines of a live display at
every refresh. So the pictures are not part of it: they have lines of their own right above, and
each is painted once, when it has changed. Only the captions below them are live.

    what was said        scrolls away
    pictures             painted in place, from the first live line upwards
    captions, bar        rich's live display
"""

import random
from typing import Self

from PIL import Image
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import ControlType, Segment
from rich.text import Text

from imagemill.commands.follow import News
from imagemill.terminal.detect import Pictures, Screen, undisturbed
from imagemill.terminal.graphics import LARGEST, PAINT, Place, kitty_gone
from imagemill.terminal.interrupts import unbroken
from imagemill.terminal.watch import GAP, Watched, empty_tile, layout

FRAMES = 10
LIVE_LINES = 2

SAVE, RESTORE, ERASE_BELOW = "\x1b7", "\x1b8", "\x1b[J"


class Raw:
    """Escape sequences, which rich neither measures nor touches."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self._text, None, ((ControlType.CARRIAGE_RETURN,),))


class Painted(Watched):
    """The bar with painted pictures above it; they stay when the bar goes."""

    def __init__(self, console: Console, screen: Screen) -> None:
        self._screen = screen
        self._first = random.randint(1, 2**31)
        self._side = 0
        self._painted: list[Image.Image | None] = []
        super().__init__(console, LARGEST, FRAMES)

    def say(self, message: str) -> None:
        """Show a sentence above the pictures."""
        has_pictures = self._side > 0
        self._lift()
        super().say(message)
        if has_pictures:
            self._paint()

    def update(self, news: News) -> None:
        """Move the bar, and paint what has changed."""
        super().update(news)
        self._paint()

    def _paint(self) -> None:
        side, _ = layout(self._console.width, self._console.height)
        tiles = self.tiles()
        if not tiles or side // 2 + LIVE_LINES >= self._console.height:
            return
        if len(tiles) < len(self._painted):
            self._lift()
        if side != self._side:
            self._console.line(side // 2)
            self._side, self._painted = side, []
        before, now = self._painted, [tile.picture for tile in tiles]
        changed = [
            self._at(slot, picture)
            for slot, picture in enumerate(now)
            if slot >= len(before) or before[slot] is not picture
        ]
        if changed:
            with unbroken():
                self._console.print(Raw("".join(changed)))
        self._painted = now

    def _at(self, slot: int, picture: Image.Image | None) -> str:
        """From the first live line to the slot, the picture, and back."""
        rows, left = self._side // 2, slot * (self._side + GAP)
        place = Place(self._side, rows, self._screen.cell, self._first + slot)
        painted = PAINT[self._screen.kind](picture or empty_tile(), place)
        aside = f"\x1b[{left}C" if left else ""
        return f"{SAVE}\x1b[{rows}A\r{aside}{painted}{RESTORE}"

    def _lift(self) -> None:
        """Take the pictures away, and the lines that they were on."""
        if not self._side:
            return
        gone = ""
        if self._screen.kind is Pictures.KITTY:
            gone = "".join(kitty_gone(self._first + slot) for slot in range(len(self._painted)))
        self._console.print(Raw(f"{gone}\x1b[{self._side // 2}A\r{ERASE_BELOW}"))
        self._side, self._painted = 0, []

    def _above(self) -> list[RenderableType]:
        """The captions, or the blank line that holds their place."""
        side = self._side
        shown = self.tiles() if side else []
        line = (" " * GAP).join(tile.caption[:side].ljust(side) for tile in shown)
        return [Text(line or " ", style="dim", no_wrap=True, overflow="crop")]

    def __enter__(self) -> Self:
        self._calm = undisturbed(self._console)
        self._calm.__enter__()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        try:
            super().__exit__()
        finally:
            self._calm.__exit__(None, None, None)

    def _leave(self) -> None:
        if self._side:
            super()._leave()
        self._side, self._painted = 0, []
