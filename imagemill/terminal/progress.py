"""Progress output: bars for the job and its images in a terminal, plain lines elsewhere.

Both implement the `View` of `follow.py`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from imagemill.commands.follow import News, Running
from imagemill.terminal.interrupts import signals_blocked
from imagemill.terminal.show import duration, printable, speed

PLAIN_PAUSE = 5.0
"""Seconds between two lines of progress outside a terminal."""

ROWS = 8
"""Maximum number of running images with their own bar."""

ROW_BAR = 20
"""Characters of an image's bar; its prompt gets the rest of the line."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        news: News | None = task.fields.get("news")
        return Text(speed(news.per_second) if news else "–", style="cyan")


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        news: News | None = task.fields.get("news")
        if news is None or news.note:
            return Text(news.note if news else "", style="yellow")
        return Text(f"{duration(news.eta)} left" if news.eta is not None else "", style="green")


def image_rows(running: Sequence[Running], most: int) -> Iterator[RenderableType]:
    """A line per running image with number, prompt, bar and steps; at most `most` lines."""
    if not running or most <= 0:
        return
    visible = running if len(running) <= most else running[: most - 1]
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(width=ROW_BAR)
    table.add_column(justify="right", no_wrap=True)
    for image in visible:
        prompt = Text(printable(" ".join(image.prompt.split())))
        bar = ProgressBar(image.steps, image.step, width=ROW_BAR)
        table.add_row(f"#{image.index}", prompt, bar, f"{image.step}/{image.steps}")
    yield table
    if len(running) > len(visible):
        yield Text(f"… and {len(running) - len(visible)} more", style="dim")


class _Progress(Progress):
    """A progress display with additional lines above and below the bar."""

    def __init__(
        self,
        above: Callable[[], Iterable[RenderableType]],
        below: Callable[[], Iterable[RenderableType]],
        *columns: ProgressColumn,
        **options: Any,
    ) -> None:
        self._above, self._below = above, below
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from self._above()
        yield from super().get_renderables()
        yield from self._below()


class Bar:
    """Progress in a terminal: bars that advance by denoising steps. A context manager.

    The job's bar comes first, so it stays in place while the images' bars below come and go.
    """

    def __init__(
        self,
        console: Console,
        above: Callable[[], Iterable[RenderableType]] = list,
        frames: float = 10,
    ) -> None:
        """`above` is called at every refresh and returns the lines above the bar."""
        self._running: Sequence[Running] = ()
        self._console = console
        self._progress = _Progress(
            above,
            self._below,
            SpinnerColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("[bold]{task.fields[images]}[/bold] images"),
            _Rate(),
            _Left(),
            console=console,
            transient=True,
            expand=True,
            refresh_per_second=frames,
        )
        self._task = self._progress.add_task("", total=1.0, images="0", news=None)

    def say(self, message: str) -> None:
        """Show a sentence above the bar."""
        # After the end, let the terminal wrap long lines: hard line breaks would end up in a
        # command that the user copies. The live display itself needs rich to wrap.
        is_over = not self._progress.live.is_started
        text = escape(printable(message))
        self._progress.console.print(text, highlight=False, soft_wrap=is_over)

    def note(self, reason: str) -> None:
        """Show why there is no progress, until the next update."""
        news: News | None = self._progress.tasks[0].fields["news"]
        if news is not None:
            self._progress.update(self._task, news=replace(news, note=reason))

    def update(self, news: News) -> None:
        """Update the bars."""
        failed = f" ({news.failed} failed)" if news.failed else ""
        images = f"{news.saved}/{news.total}{failed}"
        self._running = news.running
        self._progress.update(self._task, completed=news.progress, images=images, news=news)

    def _below(self) -> Iterable[RenderableType]:
        # A live display that's higher than its terminal can't be erased again.
        return image_rows(self._running, min(ROWS, self._console.height - 2))

    def __enter__(self) -> "Bar":
        with signals_blocked():
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with signals_blocked():
            self._progress.stop()


class Lines:
    """Progress outside a terminal: a line every PLAIN_PAUSE seconds and at every 10 %."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown, self._tenth, self._note = 0.0, -1, ""

    def say(self, message: str) -> None:
        """Print a sentence."""
        self._console.print(escape(printable(message)), highlight=False, soft_wrap=True)

    def note(self, reason: str) -> None:
        """Print why there is no progress, once per reason."""
        if reason != self._note:
            self._note = reason
            self.say(reason)

    def update(self, news: News) -> None:
        """Print the progress if enough has changed or enough time has passed."""
        now, tenth = time.monotonic(), int(news.progress * 10)
        is_new = (tenth, news.note) != (self._tenth, self._note)
        if now - self._shown < PLAIN_PAUSE and not is_new:
            return
        self._shown, self._tenth, self._note = now, tenth, news.note
        parts = [f"{news.saved}/{news.total} images", f"{news.progress:.0%}"]
        if news.failed:
            parts.append(f"{news.failed} failed")
        if news.per_second and not news.note:
            parts += [speed(news.per_second), f"{duration(news.eta)} left"]
        self.say(", ".join([*parts, *filter(None, [news.note])]))

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        return
