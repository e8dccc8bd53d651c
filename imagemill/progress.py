"""Progress as people see it: a bar on a terminal, plain lines elsewhere.

Both are a `View` of `follow.py`. Talks to no server.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from imagemill.follow import News
from imagemill.interrupts import unbroken
from imagemill.show import duration, printable, speed

PLAIN_PAUSE = 5.0
"""Seconds between two lines of progress where there is no terminal."""


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


class _Progress(Progress):
    """With something above the bar."""

    def __init__(
        self, above: Callable[[], Iterable[RenderableType]], *columns: ProgressColumn, **kept: Any
    ) -> None:
        self._above = above
        super().__init__(*columns, **kept)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from self._above()
        yield from super().get_renderables()


class Bar:
    """Progress on a terminal: a bar that moves by denoising steps; use as a context manager."""

    def __init__(
        self,
        console: Console,
        above: Callable[[], Iterable[RenderableType]] = list,
        frames: float = 10,
    ) -> None:
        """`above` is asked at every refresh for what stands over the bar."""
        self._progress = _Progress(
            above,
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
        # a terminal's own line breaks are no part of a command that is copied from it
        is_over = not self._progress.live.is_started
        said = escape(printable(message))
        self._progress.console.print(said, highlight=False, soft_wrap=is_over)

    def note(self, reason: str) -> None:
        """Show why nothing moves, until the next news."""
        news: News | None = self._progress.tasks[0].fields["news"]
        if news is not None:
            self._progress.update(self._task, news=replace(news, note=reason))

    def update(self, news: News) -> None:
        """Move the bar."""
        failed = f" ({news.failed} failed)" if news.failed else ""
        images = f"{news.saved}/{news.total}{failed}"
        self._progress.update(self._task, completed=news.progress, images=images, news=news)

    def __enter__(self) -> "Bar":
        with unbroken():
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with unbroken():
            self._progress.stop()


class Lines:
    """Progress where there is no terminal: a plain line now and then, and at every tenth."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown, self._tenth, self._note = 0.0, -1, ""

    def say(self, message: str) -> None:
        """Print a sentence."""
        self._console.print(escape(printable(message)), highlight=False, soft_wrap=True)

    def note(self, reason: str) -> None:
        """Print why nothing moves, once for each reason."""
        if reason != self._note:
            self._note = reason
            self.say(reason)

    def update(self, news: News) -> None:
        """Print how it goes, if there is enough that is new."""
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
