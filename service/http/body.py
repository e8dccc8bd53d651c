"""Reads a JSON body: its type, its size while it streams, strict JSON, then the schema.

Strict means what interoperates (RFC 8259): UTF-8, no NaN, no number beyond a double, no key twice.
A large body is parsed and validated on a thread, so that thousands of prompts hold up nobody.
Knows no schema of its own.
"""

import json
import math
from collections.abc import Awaitable, Callable
from email.message import Message
from typing import Any, NoReturn, TypeVar

import anyio.to_thread
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from service.http.errors import BodyTooLarge, MalformedBody, UnsupportedBody, invalid

BodyModel = TypeVar("BodyModel", bound=BaseModel)

SMALL_BODY_BYTES = 4096
"""A body up to this is validated at once: that takes less than a thread does."""

MAX_DEPTH = 64
"""Nesting of arrays and objects that a body may have."""


def json_body(model: type[BodyModel]) -> Callable[[Request], Awaitable[BodyModel]]:
    """A FastAPI dependency that reads the request's body as `model`.

    Raises UnsupportedBody, BodyTooLarge, MalformedBody, or InvalidRequest with every bad field.
    """

    async def read(request: Request) -> BodyModel:
        raw = await read_bytes(request, request.app.state.context.settings.max_body_bytes)
        if len(raw) <= SMALL_BODY_BYTES:
            return _validated(model, raw)
        return await anyio.to_thread.run_sync(_validated, model, raw)

    return read


def json_body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `model` through `json_body`."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def read_bytes(request: Request, limit: int) -> bytes:
    """The whole body of a JSON request; refuses one of more than `limit` bytes while it comes."""
    _check_type(request)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise BodyTooLarge(f"the body has more than {limit} bytes")
    chunks, total = [], 0
    try:
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit:
                raise BodyTooLarge(f"the body has more than {limit} bytes")
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise MalformedBody("the connection ended before the body did") from error
    return b"".join(chunks)


def parse(raw: bytes) -> Any:
    """Strict JSON. Raises MalformedBody."""
    if not raw:
        raise MalformedBody("a JSON body is required")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_not_a_number,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise MalformedBody(f"the body is nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise MalformedBody(f"the body is not JSON: {error}") from error
    _check_depth(value)
    return value


def _validated(model: type[BodyModel], raw: bytes) -> BodyModel:
    value = parse(raw)
    try:
        body = model.model_validate(value)
    except ValidationError as error:
        raise invalid(error) from error
    _check_text(raw, value)
    return body


def media_type(request: Request) -> str | None:
    """The body's type in small letters, if it is named. Raises UnsupportedBody: not in UTF-8."""
    if "content-type" not in request.headers:
        return None
    message = Message()
    message["content-type"] = request.headers["content-type"]
    if message.get_content_charset("utf-8") not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedBody("the body must be in UTF-8")
    return message.get_content_type()


def _check_type(request: Request) -> None:
    kind = media_type(request)
    if kind is None or not (kind == "application/json" or kind.endswith("+json")):
        raise UnsupportedBody("the body must be application/json")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedBody("the body must not be compressed")


def _check_text(raw: bytes, value: Any) -> None:
    """Refuse half of a surrogate pair in a text that no schema looked at."""
    if b"\\ud" in raw.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise MalformedBody("the body holds half of a surrogate pair") from error


def _check_depth(value: Any) -> None:
    """Refuse deep nesting, without recursion."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise MalformedBody(f"the body is nested more than {MAX_DEPTH} deep")
        containers = [one for one in level if isinstance(one, dict | list)]
        level = [
            inner
            for one in containers
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        depth += 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key in found:
        if not key.isascii() and any("\ud800" <= letter <= "\udfff" for letter in key):
            raise ValueError("a key holds half of a surrogate pair")
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond a double")
    return value
