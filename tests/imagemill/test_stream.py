"""The event stream of large jobs: its frames, its use by `generate`, and the fallback."""

import json
from pathlib import Path
from typing import Any

import pytest

from imagemill.client import stream
from imagemill.client.clients import Client
from imagemill.client.protocol import lines
from imagemill.client.stream import Frame, Stream, frames
from imagemill.commands import follow
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.test_generate import run, server
from tests.waiting import wait_until

__all__ = ["server"]

PROMPTS = ["one", "two", "three", "four", "five", "six"]


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LARGE", 3)
    monkeypatch.setattr(stream, "RETRY_SECONDS", 0.001)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_frames_are_parsed_from_chunks_of_any_size(size: int) -> None:
    text = (
        ": hello\r\n\r\nevent: image\nid: 7-0\ndata: {\u2028}\n\nid: 8-0\ndata:a\ndata: b\n\n"
        "event: image\ndata: cut off"
    )
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(frames(lines(chunks))) == [
        Frame("image", "{\u2028}", "7-0"),
        Frame("message", "a\nb", "8-0"),
    ]


def test_a_large_job_is_polled_without_its_images(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are saved, the last ones from the one full poll at the end."""
    server.streams = []
    monkeypatch.setattr(stream, "FAILURES", 10_000)
    done = run("generate", *PROMPTS, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    assert len(list(tmp_path.glob("0*.png"))) == 6
    assert {image["state"] for image in json.loads(done.stdout)["images"]} == {"succeeded"}
    assert server.briefs >= 5
    assert server.calls["GET /v1/jobs/ID"] == server.briefs + 1
    assert server.streams[0] is None


def test_a_stream_resumes_after_it_ends(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In between there may be any number of streams without an event."""
    monkeypatch.setattr(stream, "FAILURES", 10_000)
    server.streams = []
    with Client(server.url) as client:
        job = client.submit("demo", PROMPTS)
        job.refresh()
        reader = Stream(client, job.id)
        reader.start()
        wait_until(lambda: "1" in server.streams)
        job.refresh()
        images: list[dict[str, Any]] = []
        wait_until(lambda: images.extend(reader.take()) or len(images) == 2)
        reader.close()
    assert [image["index"] for image in images] == [0, 1]


def test_without_a_stream_the_images_are_polled(server: FakeServer, tmp_path: Path) -> None:
    server.fails = {"two"}
    done = run("generate", *PROMPTS, "--out", tmp_path)
    assert done.exit_code == 1
    assert len(list(tmp_path.glob("0*.png"))) == 5
    assert server.calls["GET /v1/jobs/ID/events"] == 1
    assert server.calls["GET /v1/jobs/ID"] > server.briefs


@pytest.mark.parametrize(
    ("shown", "largest", "running"), [(True, 9, 6), (False, 9, 0), (True, 5, 0)]
)
def test_a_large_job_is_listed_occasionally_if_running_images_are_shown(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, shown: bool, largest: int, running: int
) -> None:
    """The first full poll comes at once, the next much later; the stream updates its images."""
    monkeypatch.setattr(follow, "LARGEST_LOOK", largest)
    monkeypatch.setattr(follow, "LOOK_PER_IMAGE", 0.0)
    monkeypatch.setattr(stream, "FAILURES", 10_000)
    server.streams, server.moves = [], True
    with Client(server.url) as client:
        job = client.submit("demo", PROMPTS).raw
        with follow.JobFeed(client, job, shown) as feed:
            first = feed.news()
            monkeypatch.setattr(follow, "LOOK_PER_IMAGE", 1e6)
            second = feed.news()
    assert first is not None and second is not None
    for update in (first, second):
        assert [image["state"] for image in update["images"]].count("running") == running
    assert {image["step"] for image in second["images"]} == ({1} if running else {0})
    assert server.briefs == (1 if running else 2)


def test_small_jobs_use_no_stream(server: FakeServer, tmp_path: Path) -> None:
    server.streams = []
    assert run("generate", *PROMPTS[:3], "--out", tmp_path).exit_code == 0
    assert (server.streams, server.briefs) == ([], 0)
