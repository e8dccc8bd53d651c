"""Rates computed from measured progress, and how the views show them."""

import io
from itertools import pairwise

import pytest
from rich.console import Console

from imagemill.commands.follow import News, Rate
from imagemill.terminal.progress import Bar, Lines
from imagemill.terminal.show import duration, speed


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([], None),
        ([(0, 0.0)], None),
        ([(0, 0.0), (5, 0.0)], None),
        ([(0, 0.0), (5, 0.5)], 0.1),
        ([(0, 0.0), (50, 0.0), (55, 0.5)], 0.1),
        ([(0, 0.9), (1, 0.1), (2, 0.3)], 0.2),
        ([(t, t * t / 1e4) for t in range(101)], (1.0 - 0.7225) / 15),
    ],
)
def test_rate(seen: list[tuple[float, float]], expected: float | None) -> None:
    rate = Rate()
    for moment, progress in seen:
        rate.add(moment, progress)
    found = rate.per_second()
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_rate_is_never_negative() -> None:
    rate = Rate()
    for (moment, progress), _ in pairwise([(i, (i * 7 % 11) / 11) for i in range(60)]):
        rate.add(moment, progress)
        assert (rate.per_second() or 0.0) >= 0.0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "–"), (0.2, "0 s"), (59.4, "59 s"), (65, "1:05 min"), (7380, "2:03:00 h")],
)
def test_duration(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said


def test_speed() -> None:
    assert (speed(None), speed(1.26), speed(0.02)) == ("–", "1.3 images/s", "50 s/image")


def news(progress: float, saved: int, note: str = "") -> News:
    return News(12, saved, 1, progress, 2.0, 5.0, note)


def test_lines_are_printed_at_every_tenth() -> None:
    out = io.StringIO()
    with Lines(Console(file=out, width=100)) as lines:
        lines.update(news(0.0, 0, "loading the model"))
        for percent in range(100):
            lines.update(news(percent / 100, percent // 10))
    said = out.getvalue().splitlines()
    assert said[0] == "0/12 images, 0%, 1 failed, loading the model"
    assert said[2] == "1/12 images, 10%, 1 failed, 2.0 images/s, 5 s left"
    assert len(said) == 11


def test_the_bar_shows_images_rate_and_time_left() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    with Bar(console) as bar:
        bar.note("too early")
        bar.update(news(0.25, 3))
        bar.note("waiting for the server")
        console.print(bar._progress.get_renderable())
        assert "waiting for the server" in out.getvalue() and "left" not in out.getvalue()
        bar.update(news(0.25, 3))
        bar.say("[not markup]")
        console.print(bar._progress.get_renderable())
    assert "25 %" in out.getvalue()
    assert "3/12 (1 failed) images" in out.getvalue()
    assert "2.0 images/s" in out.getvalue()
    assert "5 s left" in out.getvalue()
    assert "[not markup]" in out.getvalue()
