"""Reading a body: never more than the limit, whatever its headers say."""

import anyio
import pytest
from starlette.requests import Request

from service.http.body import parse, read_bytes
from service.http.errors import BodyTooLarge, MalformedBody


def request(*chunks: bytes, **headers: str) -> tuple[Request, list[bytes]]:
    """A JSON request that streams these chunks, and the list of chunks read so far."""
    read: list[bytes] = []
    left = list(chunks)

    async def receive() -> dict:
        if not left:
            return {"type": "http.disconnect"}
        read.append(left.pop(0))
        return {"type": "http.request", "body": read[-1], "more_body": bool(left)}

    headers_ = {"content-type": "application/json", **headers}
    raw = [(name.encode(), value.encode()) for name, value in headers_.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive), read


def test_body_of_exactly_the_limit_is_read() -> None:
    body, read = request(b"12", b"34", b"5")
    assert anyio.run(read_bytes, body, 5) == b"12345"
    assert len(read) == 3


def test_reading_stops_at_the_limit() -> None:
    body, read = request(*[b"x" * 10] * 1000)
    with pytest.raises(BodyTooLarge):
        anyio.run(read_bytes, body, 25)
    assert len(read) == 3


@pytest.mark.parametrize("length", ["26", "9" * 30])
def test_too_large_content_length_is_refused_without_reading(length: str) -> None:
    body, read = request(b"x", **{"content-length": length})
    with pytest.raises(BodyTooLarge):
        anyio.run(read_bytes, body, 25)
    assert read == []


def test_truncated_body_is_malformed() -> None:
    async def receive() -> dict:
        return {"type": "http.disconnect"}

    headers = [(b"content-type", b"application/json")]
    broken = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    with pytest.raises(MalformedBody):
        anyio.run(read_bytes, broken, 25)


@pytest.mark.parametrize(
    ("raw", "value"), [(b"[1, 2.5]", [1, 2.5]), (b'{"a": {"a": null}}', {"a": {"a": None}})]
)
def test_valid_json_is_parsed(raw: bytes, value: object) -> None:
    assert parse(raw) == value
