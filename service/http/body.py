"""Reads a JSON body: checks its type, its size while it streams, strict JSON, then the schema.

Strict means interoperable (RFC 8259): UTF-8, no NaN, no number too large for a double, no duplicate
keys. A large body is parsed and validated on a thread, because thousands of prompts would block the
event loop. Has no schemas of its own.
"""

import json
import math
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable
from email.message import Message
from typing import Any, NoReturn, TypeVar

import anyio.to_thread
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from service.http.errors import BodyTooLarge, MalformedBody, UnsupportedBody, invalid

BodyModel = TypeVar("BodyModel", bound=BaseModel)

SMALL_BODY_BYTES = 4096
"""Bodies up to this size are validated inline, which is faster than switching to a thread."""

MAX_DEPTH = 64
"""Maximum nesting of arrays and objects in a body."""


def json_body(model: type[BodyModel]) -> Callable[[Request], Awaitable[BodyModel]]:
    """A FastAPI dependency that reads the request's body as `model`.

    Raises UnsupportedBody, BodyTooLarge, MalformedBody, or InvalidRequest with every invalid field.
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
    """The whole body of a JSON request; stops reading once it exceeds `limit` bytes."""
    _check_type(request)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise BodyTooLarge(f"the body is larger than {limit} bytes")
    chunks, total = [], 0
    try:
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit:
                raise BodyTooLarge(f"the body is larger than {limit} bytes")
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise MalformedBody("the connection was closed before the end of the body") from error
    return b"".join(chunks)


def parse(raw: bytes) -> Any:
    """Strict JSON; a byte order mark before it is ignored. Raises MalformedBody."""
    raw = raw.removeprefix(BOM_UTF8)
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
        raise MalformedBody(f"the body isn't valid UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise MalformedBody(f"the body is nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:
        raise MalformedBody(f"the body isn't valid JSON: {error}") from error
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
    """The body's media type in lower case, if any. Raises UnsupportedBody if it isn't UTF-8."""
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
    """Refuse lone surrogates in text that the schema didn't check."""
    if b"\\ud" in raw.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise MalformedBody("the body contains a lone surrogate") from error


def _check_depth(value: Any) -> None:
    """Refuse deep nesting, without recursion."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise MalformedBody(f"the body is nested more than {MAX_DEPTH} levels deep")
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [
            inner
            for container in containers
            for inner in (container.values() if isinstance(container, dict) else container)
            if isinstance(inner, dict | list)
        ]
        depth += 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    for key in members:
        if not key.isascii() and any("\ud800" <= letter <= "\udfff" for letter in key):
            raise ValueError("a key contains a lone surrogate")
    if len(members) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {duplicate!r}")
    return members


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large for a double")
    return value
