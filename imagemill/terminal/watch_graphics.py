"""`generate --watch` with real images, using a graphics protocol of the terminal.

Erasing a line of text erases the images on it, and rich erases all lines of a live display at every
refresh. So the images aren't part of the live display. They have their own lines directly above it
and are painted only when they change. Only the captions below them are live.

    messages             scroll away
    images               painted in place, upwards from the first live line
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
from imagemill.terminal.interrupts import signals_blocked
from imagemill.terminal.watch import GAP, PreviewBar, empty_tile, layout

FRAMES = 10
LIVE_LINES = 2

SAVE, RESTORE, ERASE_BELOW = "\x1b7", "\x1b8", "\x1b[J"


class Raw:
    """Escape sequences that rich prints as they are."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # rich neither measures nor wraps a segment with a control code; which code doesn't matter.
        yield Segment(self._text, None, ((ControlType.CARRIAGE_RETURN,),))


class GraphicsPreviewBar(PreviewBar):
    """The bar with painted images above it, which stay on the screen when the bar ends."""

    def __init__(self, console: Console, screen: Screen) -> None:
        self._screen = screen
        # kitty replaces an image that has the same number, also one painted by an earlier run.
        self._first = random.randint(1, 2**31)
        self._side = 0  # width of the painted images in characters; 0 while there are none
        self._painted: list[Image.Image | None] = []
        super().__init__(console, LARGEST, FRAMES)

    def say(self, message: str) -> None:
        """Show a sentence above the images."""
        # Printing scrolls the lines above the live display, but the cursor movements in `_at` are
        # relative to it. So remove the images, print, and paint them again below the sentence.
        has_pictures = self._side > 0
        self._erase()
        super().say(message)
        if has_pictures:
            self._paint()

    def update(self, news: News) -> None:
        """Update the bar, and paint the images that have changed."""
        super().update(news)
        self._paint()

    def _paint(self) -> None:
        side, _ = layout(self._console.width, self._console.height)
        tiles = self.tiles()
        if not tiles or side // 2 + LIVE_LINES >= self._console.height:
            return  # the images would scroll out of reach of the cursor movements
        if len(tiles) < len(self._painted):
            self._erase()  # painting only adds or replaces, so start over when tiles disappear
        if side != self._side:
            # Print blank lines to paint on, which pushes the live display down.
            self._console.line(side // 2)
            self._side, self._painted = side, []
        before, now = self._painted, [tile.picture for tile in tiles]
        changed = [
            self._at(slot, picture)
            for slot, picture in enumerate(now)
            # Identity is enough, because `PreviewBar` keeps each image as one object. Comparing
            # pixels would be slow, and repainting an unchanged image makes it flicker.
            if slot >= len(before) or before[slot] is not picture
        ]
        if changed:
            # A signal could truncate the write, and the terminal would then swallow what follows.
            with signals_blocked():
                self._console.print(Raw("".join(changed)))
        self._painted = now

    def _at(self, slot: int, picture: Image.Image | None) -> str:
        """Move from the first live line to the slot, paint the image, and move back."""
        # Save and restore the cursor, because its position after an image differs by terminal.
        rows, left = self._side // 2, slot * (self._side + GAP)
        place = Place(self._side, rows, self._screen.cell, self._first + slot)
        painted = PAINT[self._screen.kind](picture or empty_tile(), place)
        indent = f"\x1b[{left}C" if left else ""  # a count of 0 would still move by one
        return f"{SAVE}\x1b[{rows}A\r{indent}{painted}{RESTORE}"

    def _erase(self) -> None:
        """Remove the images and the lines they were on."""
        if not self._side:
            return
        delete = ""
        if self._screen.kind is Pictures.KITTY:  # where erasing text leaves the images
            delete = "".join(kitty_gone(self._first + slot) for slot in range(len(self._painted)))
        self._console.print(Raw(f"{delete}\x1b[{self._side // 2}A\r{ERASE_BELOW}"))
        self._side, self._painted = 0, []

    def _above(self) -> list[RenderableType]:
        """The captions, or a blank line in their place so that the display keeps its height."""
        side = self._side
        tiles = self.tiles() if side else []
        line = (" " * GAP).join(tile.caption[:side].ljust(side) for tile in tiles)
        return [Text(line or " ", style="dim", no_wrap=True, overflow="crop")]

    def __enter__(self) -> Self:
        # Before the first refresh, so that echoed keys can't end up in an image.
        self._undisturbed = undisturbed(self._console)
        self._undisturbed.__enter__()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        try:
            super().__exit__()
        finally:
            self._undisturbed.__exit__(None, None, None)

    def _leave(self) -> None:
        # The images are already on the screen; only their captions went with the live display.
        if self._side:
            super()._leave()
        self._side, self._painted = 0, []
