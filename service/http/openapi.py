"""The OpenAPI document: FastAPI's own, plus our problem documents and request bodies.

Bodies are read by `service/http/body.py` rather than FastAPI, so their schemas are added here.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.http.for_generators import prepare
from service.openai.batch_schemas import CreateBatch
from service.openai.schemas import GenerateImages, OpenAIError
from service.sdapi.schemas import ChosenOptions, PngToRead, TaskToFollow, TextToImage
from service.submit.schemas import Problem, SubmitJob

_MEANINGS = {
    400: "The body or a header is malformed.",
    401: "The API key is missing or unknown.",
    403: "A browser sent this on behalf of another site, or the URL's signature is invalid.",
    404: "Not found.",
    408: "The caller disconnected.",
    409: "It conflicts with the current state.",
    410: "It has been removed.",
    413: "The body is too large.",
    415: "The route doesn't support the body's media type.",
    416: "The range is outside the file.",
    422: "Invalid fields; each one is listed.",
    429: "The caller has too much unfinished work, or exceeded its rate limit.",
    502: "A worker couldn't generate the images.",
    503: "The queue is unreachable, or no worker is ready; Retry-After says when to retry.",
    504: "The images weren't generated in time.",
}

_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}

_ENVELOPE = {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}}

Responses = dict[int | str, dict[str, Any]]

NOT_MODIFIED: Responses = {304: {"description": "The caller's ETag is current."}}


def problems(*statuses: int) -> Responses:
    """`responses` of a route for the problem documents that it can return."""
    return {status: {"description": _MEANINGS[status], "content": _PROBLEM} for status in statuses}


def openai_errors(*statuses: int) -> Responses:
    """`responses` of a route that fails in OpenAI's envelope (422 only replaces FastAPI's own)."""
    return {
        status: {"description": _MEANINGS[status], "content": _ENVELOPE}
        for status in (*statuses, 422)
    }


def binary(*media_types: str) -> Responses:
    """`responses` of a route that succeeds with bytes.

    `application/octet-stream` is listed too, because some generators know only that as bytes.
    OpenAPI 3.1 has `contentMediaType` for them; most generators still look for `format`.
    """
    return {
        200: {
            "description": "The bytes.",
            "content": {
                media_type: {
                    "schema": {
                        "type": "string",
                        "format": "binary",
                        "contentMediaType": media_type,
                    }
                }
                for media_type in dict.fromkeys((*media_types, "application/octet-stream"))
            },
        }
    }


def event_stream(*events: str) -> dict[str, Any]:
    """`content` of a response of Server-Sent Events with these names and JSON data."""
    data = {"type": "string", "contentMediaType": "application/json"}
    fields = {"event": {"enum": list(events)}, "data": data, "id": {"type": "string"}}
    event = {"type": "object", "required": ["event", "data"], "properties": fields}
    return {"text/event-stream": {"itemSchema": event}}


def complete_document(app: FastAPI) -> dict[str, Any]:
    """The application's OpenAPI document, built once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        _, ours = models_json_schema(
            [
                (SubmitJob, "validation"),
                (GenerateImages, "validation"),
                (CreateBatch, "validation"),
                (TextToImage, "validation"),
                (TaskToFollow, "validation"),
                (ChosenOptions, "validation"),
                (PngToRead, "validation"),
                (Problem, "serialization"),
                (OpenAIError, "serialization"),
            ],
            ref_template="#/components/schemas/{model}",
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(ours["$defs"])
        _make_keys_optional(document)
        prepare(document)
        app.openapi_schema = document
    return app.openapi_schema


def _make_keys_optional(document: dict[str, Any]) -> None:
    """Make authentication optional, because a service may have no keys."""
    for methods in document["paths"].values():
        for operation in methods.values():
            if "security" in operation:
                operation["security"].append({})
