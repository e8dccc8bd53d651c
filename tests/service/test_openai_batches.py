"""OpenAI Files and Batches with OpenAI's own client, against a running service."""

import base64
import json
from collections.abc import Iterator

import openai
import pytest

from jobs.runtime.embedded_queue import EmbeddedServer
from service.openai import batch_input, batches
from tests import web
from tests.service.conftest import CATALOG, Deployment, picture, working
from tests.service.live import batch_service
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def live(
    server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, openai.OpenAI]]:
    """A service that listens on a port, and OpenAI's client for it."""
    with batch_service(server, tmp_path_factory.mktemp("batches")) as parts:
        yield parts


def line(custom_id: str, **body: object) -> str:
    """A line of an input file."""
    return json.dumps(
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/images/generations",
            "body": {"prompt": f"prompt of {custom_id}", **body},
        }
    )


def upload(client: openai.OpenAI, *lines: str) -> str:
    """Upload a file of these lines and return its id."""
    data = "\n".join(lines).encode()
    return client.files.create(file=("in.jsonl", data), purpose="batch").id


def begin(client: openai.OpenAI, *lines: str) -> openai.types.Batch:
    """Create a batch of these lines, and wait until they have been checked."""
    batch = client.batches.create(
        input_file_id=upload(client, *lines),
        endpoint="/v1/images/generations",
        completion_window="24h",
        metadata={"k": "v"},
    )
    assert (batch.status, batch.in_progress_at) == ("validating", None)
    return validated(client, batch.id)


def validated(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    """The batch, once its lines have been checked."""

    def look() -> openai.types.Batch | None:
        latest = client.batches.retrieve(batch_id)
        return None if latest.status == "validating" else latest

    return wait_until(look)


def ended(client: openai.OpenAI, batch: openai.types.Batch) -> openai.types.Batch:
    """Wait for the batch to end."""

    def look() -> openai.types.Batch | None:
        latest = client.batches.retrieve(batch.id)
        running = ("validating", "in_progress", "cancelling", "finalizing")
        return None if latest.status in running else latest

    return wait_until(look)


def outcomes(client: openai.OpenAI, file_id: str) -> dict[str, dict]:
    """The lines of an output file by custom_id."""
    entries = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    return {entry["custom_id"]: entry for entry in entries}


def test_file_is_returned_unchanged(live: tuple) -> None:
    _, client = live
    data = b"line \xff\x00 one\nline two"
    stored = client.files.create(file=("näme.jsonl", data), purpose="batch")
    assert (stored.object, stored.bytes, stored.filename) == ("file", len(data), "näme.jsonl")
    assert client.files.retrieve(stored.id) == stored
    assert client.files.content(stored.id).content == data
    assert stored.id in [file.id for file in client.files.list()]
    assert client.files.delete(stored.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(stored.id)


def test_files_are_listed_in_pages(live: tuple) -> None:
    _, client = live
    file_ids = {upload(client, str(number)) for number in range(5)}
    listed = [file.id for file in client.files.list(limit=2)]
    assert file_ids <= set(listed) and len(set(listed)) == len(listed)
    backwards = [file.id for file in client.files.list(limit=2, order="asc")]
    assert backwards == listed[::-1]
    with pytest.raises(openai.BadRequestError):
        client.files.list(after="file-nope")


def test_too_large_file_is_413(live: tuple) -> None:
    _, client = live
    with pytest.raises(openai.APIStatusError) as refusal:
        client.files.create(file=("in", b"x" * 100_001), purpose="batch")
    assert refusal.value.status_code == 413


def form(content_type: str) -> dict:
    """A valid upload with another content type."""
    data = (
        '--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        '--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n--b--\r\n'
    )
    return {"content": data.encode(), "headers": {"content-type": content_type}}


@pytest.mark.parametrize(
    "content_type",
    ["Multipart/Form-Data; boundary=b", "multipart/form-data ; Charset=UTF-8; boundary=b"],
)
def test_upload_content_type_is_case_insensitive(live: tuple, content_type: str) -> None:
    deployment, _ = live
    assert deployment.client.post("/v1/files", **form(content_type)).status_code == 200


@pytest.mark.parametrize(
    ("call", "status", "param"),
    [
        ({"files": {"file": b"x"}}, 400, "purpose"),
        ({"files": {"file": b"x"}, "data": {"purpose": "vision"}}, 400, "purpose"),
        ({"files": {"other": b"x"}, "data": {"purpose": "batch"}}, 400, "file"),
        ({"files": {"purpose": b"x"}, "data": {"file": "x"}}, 400, "file"),
        ({"files": {"file": b"x"}, "data": {"purpose": "batch", "more": "x"}}, 400, "more"),
        ({"json": {"purpose": "batch"}}, 415, None),
        (form("multipart/form-data-x; boundary=b"), 415, None),
        (form("multipart/form-data; boundary=b; charset=undefined"), 415, None),
        (form('multipart/form-data; charset="idna"; boundary=b'), 415, None),
        (form("multipart/form-data; charset=utf-8; charset=undefined; boundary=b"), 400, None),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, None),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            400,
            None,
        ),
    ],
)
def test_invalid_uploads(live: tuple, call: dict, status: int, param: object) -> None:
    deployment, _ = live
    response = deployment.client.post("/v1/files", **call)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_batch_runs_and_writes_its_output(live: tuple) -> None:
    deployment, client = live
    batch = begin(
        client,
        line("one", seed=7, size="64x32"),
        "",
        line("two", n=2, response_format="b64_json"),
        line("three", model="distilled"),
    )
    assert (batch.status, batch.request_counts.total) == ("in_progress", 3)
    assert batch.metadata == {"k": "v"}
    with working(deployment), working(deployment, model="distilled"):
        done = ended(client, batch)
    assert (done.status, done.request_counts.completed) == ("completed", 3)
    assert (done.request_counts.failed, done.error_file_id) == (0, None)
    assert done.completed_at >= done.in_progress_at
    output = outcomes(client, done.output_file_id)
    assert set(output) == {"one", "two", "three"}
    assert all(entry["response"]["status_code"] == 200 for entry in output.values())
    (one,) = output["one"]["response"]["body"]["data"]
    assert one["seed"] == 7 and one["b64_json"] is None
    assert web.get(one["url"]).content == picture(64, 32)
    two = output["two"]["response"]["body"]["data"]
    assert [base64.b64decode(image["b64_json"])[:4] for image in two] == [b"\x89PNG"] * 2
    assert client.batches.retrieve(batch.id) == done
    assert batch.id in [listed.id for listed in client.batches.list(limit=1)]


def test_failed_lines_are_in_the_error_file(live: tuple) -> None:
    deployment, client = live
    batch = begin(client, line("good"), line("bad"), line("half", n=2))

    def deliver(lease: object) -> None:
        spoilt = lease.request.prompt == "prompt of bad" or lease.index == 3
        (deployment.worker.fail if spoilt else deployment.worker.finish)(lease)

    with working(deployment, deliver):
        done = ended(client, batch)
    assert (done.status, done.request_counts.completed) == ("completed", 1)
    assert done.request_counts.failed == 2
    assert set(outcomes(client, done.output_file_id)) == {"good"}
    failed = outcomes(client, done.error_file_id)
    assert set(failed) == {"bad", "half"}
    assert failed["bad"]["response"]["status_code"] == 502
    assert "it would not" in failed["bad"]["response"]["body"]["error"]["message"]


def test_counts_of_a_running_batch(live: tuple) -> None:
    deployment, client = live
    for copies in (1, 2):
        batch = begin(client, line("one", n=copies), line("two", n=copies))
        for lease in deployment.worker.claim(copies):
            deployment.worker.finish(lease)
        counts = client.batches.retrieve(batch.id).request_counts
        assert (counts.completed, counts.failed, counts.total) == (1, 0, 2)
        deployment.worker.finish_all()
        assert ended(client, batch).request_counts.completed == 2


def test_cancelled_batch_keeps_finished_lines(live: tuple) -> None:
    deployment, client = live
    batch = begin(client, line("made"), line("not"))
    (lease,) = deployment.worker.claim(1)
    deployment.worker.finish(lease)
    client.batches.cancel(batch.id)
    done = ended(client, batch)
    assert done.status == "cancelled" and done.cancelled_at
    assert set(outcomes(client, done.output_file_id)) == {"made"}
    stopped = outcomes(client, done.error_file_id)
    assert stopped["not"]["error"]["code"] == "batch_cancelled"
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_batch_expires(live: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, client = live
    monkeypatch.setattr(batches, "WINDOW_SECONDS", -1)
    batch = begin(client, line("late"))
    done = ended(client, batch)
    assert (done.status, done.output_file_id) == ("expired", None)
    assert outcomes(client, done.error_file_id)["late"]["error"]["code"] == "batch_expired"


def test_batch_with_a_deleted_job_ends(live: tuple) -> None:
    deployment, client = live
    batch = begin(client, line("gone"))
    deployment.store.delete(batch.jobs[0], None)
    done = ended(client, batch)
    assert (done.request_counts.completed, done.request_counts.failed) == (0, 1)


def test_invalid_line_only_fails_itself(live: tuple) -> None:
    deployment, client = live
    names = [f"line {number}" for number in range(20)]
    bad = {"size": "7x7"}
    batch = begin(client, *(line(name, **(bad if name == "line 7" else {})) for name in names))
    counts = batch.request_counts
    assert (batch.status, counts.total, counts.failed) == ("in_progress", 20, 1)
    with working(deployment):
        done = ended(client, batch)
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (20, 19, 1)
    assert (done.status, done.errors) == ("completed", None)
    assert set(outcomes(client, done.output_file_id)) == set(names) - {"line 7"}
    [(name, entry)] = outcomes(client, done.error_file_id).items()
    assert (name, entry["error"], entry["response"]["status_code"]) == ("line 7", None, 400)
    error = entry["response"]["body"]["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "size")
    assert error["message"]


def test_batch_of_invalid_lines_completes(live: tuple) -> None:
    deployment, client = live
    before = deployment.store.queue_depth()
    bad = [
        ("size", "size", line("size", size="100x64")),
        ("steps", "steps", line("steps", steps=1000)),
        ("model", "model", line("model", model="nope")),
        ("stream", "stream", line("stream", stream=True)),
        ("unknown", "stepz", line("unknown", stepz=1)),
        ("two", "prompt", line("two", prompt="", n=2)),
        ("body", "", json.dumps({**json.loads(line("body")), "body": []})),
        ("more", "more", json.dumps({**json.loads(line("more")), "more": 1})),
    ]
    done = ended(client, begin(client, *(text for _, _, text in bad)))
    assert (done.status, done.request_counts.failed, done.output_file_id) == ("completed", 8, None)
    errors = outcomes(client, done.error_file_id)
    assert [
        (name, entry["response"]["body"]["error"]["param"]) for name, entry in errors.items()
    ] == [(name, param) for name, param, _ in bad]
    assert {entry["response"]["status_code"] for entry in errors.values()} == {400}
    assert deployment.store.queue_depth() == before


def test_unreadable_file_is_a_failed_batch(live: tuple) -> None:
    deployment, client = live
    before = deployment.store.queue_depth()
    batch = begin(
        client,
        line("good"),
        "{",
        line("good"),
        line("size", size="100x64"),
        '{"custom_id": "x", "method": "GET", "url": "/v1/images/generations", "body": {}}',
        '{"method": "POST", "url": "/v1/images/edits", "body": {"prompt": "a"}}',
        "[]",
    )
    assert (batch.status, batch.request_counts.total) == ("failed", 0)
    named = [(error.line, error.code, error.param) for error in batch.errors.data]
    assert named == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (5, "invalid_value", "method"),
        (6, "missing_required_parameter", "custom_id"),
        (6, "url_mismatch", "url"),
        (7, "invalid_value", ""),
    ]
    assert deployment.store.queue_depth() == before
    assert client.batches.retrieve(batch.id).status == "failed"


def test_empty_file_is_a_failed_batch(live: tuple) -> None:
    _, client = live
    assert begin(client, "").errors.data[0].code == "empty_file"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"input_file_id": "file-nope"}, openai.NotFoundError),
        ({"input_file_id": "../../x"}, openai.NotFoundError),
        ({"endpoint": "/v1/chat/completions"}, openai.BadRequestError),
        ({"completion_window": "1h"}, openai.BadRequestError),
        ({"metadata": {"k": "v" * 600}}, openai.BadRequestError),
    ],
)
def test_invalid_batches(live: tuple, fields: dict, error: type[Exception]) -> None:
    _, client = live
    valid = {"endpoint": "/v1/images/generations", "completion_window": "24h"}
    if "input_file_id" not in fields:
        valid["input_file_id"] = upload(client, line("a"))
    with pytest.raises(error):
        client.batches.create(**{**valid, **fields})


def test_output_file_is_not_a_valid_input(live: tuple) -> None:
    deployment, client = live
    batch = begin(client, line("a"))
    deployment.worker.finish_all()
    output = ended(client, batch).output_file_id
    with pytest.raises(openai.BadRequestError, match="batch_output"):
        client.batches.create(
            input_file_id=output, endpoint="/v1/images/generations", completion_window="24h"
        )


def test_unknown_batches_are_404(live: tuple) -> None:
    _, client = live
    for batch_id in ("batch_nope", "x", "batch_..%2f"):
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve(batch_id)
        with pytest.raises(openai.NotFoundError):
            client.batches.cancel(batch_id)


def test_jobs_are_filled_up_to_max_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [line(str(number), n=10).encode() for number in range(12)]
    texts.append(line("other", priority=1).encode())
    rules = batch_input.Rules(CATALOG, lambda _: None, lambda asked: asked or 5)
    batch = batch_input.plan(texts, rules)
    assert [len(job.requests) for job in batch.jobs] == [50, 50, 20, 1]
    assert [(line.job, line.first) for line in batch.lines[4:6]] == [(0, 40), (1, 0)]
    monkeypatch.setattr(batch_input, "MAX_LINES", 5)
    refused = batch_input.plan(texts, rules)
    assert [error.code for error in refused.errors] == ["too_many_lines"]


def test_jobs_are_filled_up_to_the_text_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_input, "MAX_TEXT_BYTES", 8)
    rules = batch_input.Rules(CATALOG, lambda _: None, lambda asked: asked or 5)
    texts = [line(str(place), prompt="ä", n=2).encode() for place in range(5)]
    batch = batch_input.plan(texts, rules)
    assert [len(job.requests) for job in batch.jobs] == [4, 4, 2]
    assert [(line.job, line.first) for line in batch.lines] == [
        (0, 0),
        (0, 2),
        (1, 0),
        (1, 2),
        (2, 0),
    ]
