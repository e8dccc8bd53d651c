"""The OpenAPI document: what FastAPI generates, with our problem documents and bodies in it.

Bodies are read by `service/http/body.py` and not by FastAPI, so their schemas are added here.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.openai.batch_schemas import CreateBatch
from service.openai.schemas import GenerateImages, OpenAIError
from service.sdapi.schemas import PngToRead, TextToImage
from service.submit.schemas import Problem, SubmitJob

_MEANINGS = {
    400: "The body or a header cannot be read.",
    401: "The service wants an API key, or another one.",
    403: "A browser brought this from another site.",
    404: "There is no such thing.",
    408: "The caller hung up.",
    409: "It does not fit the state that it meets.",
    410: "It was there and is no more.",
    413: "The body is too large.",
    415: "The body is not of a type that the route reads.",
    416: "No byte of the range exists.",
    422: "Fields cannot be accepted; each is named.",
    429: "The caller has too much unfinished work, or calls too often.",
    502: "A worker could not make the images.",
    503: "The queue cannot be reached, or no worker is ready; Retry-After says when to try again.",
    504: "The images were not made in time.",
}

_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}

_ENVELOPE = {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}}

Responses = dict[int | str, dict[str, Any]]

NOT_MODIFIED: Responses = {304: {"description": "The caller has it already, by its ETag."}}


def problems(*statuses: int) -> Responses:
    """`responses` of a route for the problems that it can answer with."""
    return {status: {"description": _MEANINGS[status], "content": _PROBLEM} for status in statuses}


def openai_errors(*statuses: int) -> Responses:
    """`responses` of a route that fails in OpenAI's envelope (422 is there for FastAPI's sake)."""
    return {
        status: {"description": _MEANINGS[status], "content": _ENVELOPE}
        for status in (*statuses, 422)
    }


def binary(*media_types: str) -> Responses:
    """`responses` of a route that succeeds with bytes."""
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"description": "The bytes.", "content": dict.fromkeys(media_types, schema)}}


def event_stream(*events: str) -> dict[str, Any]:
    """`content` of an answer in Server-Sent Events with these names, whose data are JSON."""
    data = {"type": "string", "contentMediaType": "application/json"}
    fields = {"event": {"enum": list(events)}, "data": data, "id": {"type": "string"}}
    one = {"type": "object", "required": ["event", "data"], "properties": fields}
    return {"text/event-stream": {"itemSchema": one}}


def complete_document(app: FastAPI) -> dict[str, Any]:
    """The application's OpenAPI document, made once."""
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
                (PngToRead, "validation"),
                (Problem, "serialization"),
                (OpenAIError, "serialization"),
            ],
            ref_template="#/components/schemas/{model}",
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(ours["$defs"])
        _make_keys_optional(document)
        app.openapi_schema = document
    return app.openapi_schema


def _make_keys_optional(document: dict[str, Any]) -> None:
    """Say that a key is wanted only where the service has any."""
    for methods in document["paths"].values():
        for operation in methods.values():
            if "security" in operation:
                operation["security"].append({})
