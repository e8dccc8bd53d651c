"""`follow` with the real event stream."""

from pathlib import Path
from typing import Any

import pytest

from imagemill.client.clients import Client
from imagemill.commands import follow
from imagemill.commands.follow import News, Saved
from imagemill.terminal.interrupts import Interrupts
from tests.end_to_end.deployment import Deployment
from tests.waiting import PATIENCE


class Recorder:
    """A view that records its updates."""

    def __init__(self) -> None:
        self.news: list[News] = []

    def say(self, message: str) -> None:
        self.news.clear()

    def update(self, news: News) -> None:
        self.news.append(news)


def test_images_are_saved_from_the_stream_while_the_job_runs(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "LARGE", 3)
    view, brief = Recorder(), []
    poll = follow.protocol.poll

    def counted(*arguments: Any, **flags: Any) -> Any:
        brief.append(flags["brief"])
        return poll(*arguments, **flags)

    monkeypatch.setattr(follow.protocol, "poll", counted)
    with Client(deployment.url, patience=PATIENCE) as client, Interrupts() as interrupts:
        job = client.submit("demo", ["a red circle", "a blue heart"], n=12, steps=6).raw
        done = follow.follow(
            client,
            job,
            Saved(tmp_path),
            view,
            interrupts=interrupts,
            give_up=False,
            since=0.0,
            advice="",
        )
    assert done["state"] == "succeeded"
    assert len(list(tmp_path.glob("00*.png"))) == 24
    assert all(brief)
    assert any(0 < news.saved < 24 for news in view.news)
    progress = [news.progress for news in view.news]
    assert progress == sorted(progress)
