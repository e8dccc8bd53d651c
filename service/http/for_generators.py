"""Prepares the OpenAPI document for generators of clients and for Swagger.

Generators make a field with a `default` required or always send it, so request schemas have none;
the description says it instead. Method names come from the operation ids. Works on the document's
JSON only.
"""

import json
from collections.abc import Iterator
from typing import Any

from fastapi.routing import APIRoute

from service.http.examples import BY_OPERATION, BY_PARAMETER, BY_SCHEMA

Json = dict[str, Any]

_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_ONES = ("items", "additionalProperties", "not")


def operation_id(route: APIRoute) -> str:
    """The name of a route's function in camelCase, such as `submitJob`."""
    first, *others = route.name.split("_")
    return first + "".join(word.capitalize() for word in others)


def prepare(document: Json) -> None:
    """Move defaults of request fields into their descriptions, and add the examples."""
    schemas = document["components"]["schemas"]
    operations = [op for methods in document["paths"].values() for op in methods.values()]
    for name in sorted(request_schemas(document)):
        _describe_defaults(schemas[name])
    for operation in operations:
        for parameter in operation.get("parameters", ()):
            _describe_defaults_of_parameter(parameter)
            if parameter["in"] == "path" and parameter["name"] in BY_PARAMETER:
                parameter["example"] = BY_PARAMETER[parameter["name"]]
        for content in _contents(operation):
            _add_example(operation["operationId"], content)


def request_schemas(document: Json) -> set[str]:
    """Names of the component schemas that request bodies consist of."""
    bodies = [
        op["requestBody"]
        for methods in document["paths"].values()
        for op in methods.values()
        if "requestBody" in op
    ]
    found: set[str] = set()
    waiting = [name for body in bodies for name in _references(body)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _references(document["components"]["schemas"][name])
    return found


def subschemas(schema: Json) -> Iterator[Json]:
    """The schema and every schema inside of it, without following references."""
    yield schema
    inner = list(schema.get("properties", {}).values())
    inner += [part for key in _LISTS for part in schema.get(key, ())]
    inner += [schema[key] for key in _ONES if key in schema]
    for part in inner:
        if isinstance(part, dict):
            yield from subschemas(part)


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if isinstance(value.get("$ref"), str) else []
        return own + [name for part in value.values() for name in _references(part)]
    if isinstance(value, list):
        return [name for part in value for name in _references(part)]
    return []


def _describe_defaults(schema: Json) -> None:
    for part in subschemas(schema):
        if "default" in part:
            _describe(part, part.pop("default"))


def _describe_defaults_of_parameter(parameter: Json) -> None:
    for part in subschemas(parameter["schema"]):
        if "default" in part:
            _describe(parameter, part.pop("default"))


def _describe(described: Json, default: Any) -> None:
    """Add a default to a description that doesn't have it yet; none for null or an empty object."""
    text = described.get("description", "")
    if default not in (None, {}) and "Default:" not in text:
        value = default if isinstance(default, str) else json.dumps(default)
        described["description"] = f"{text} Default: {value}.".lstrip()


def _contents(operation: Json) -> Iterator[Json]:
    """The media types of an operation's body and successful responses."""
    yield from operation.get("requestBody", {}).get("content", {}).values()
    for status, response in operation["responses"].items():
        if status.startswith("2"):
            yield from response.get("content", {}).values()


def _add_example(operation: str, content: Json) -> None:
    reference = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    if "example" in content or is_binary(content):
        return
    if reference in BY_SCHEMA:
        content["example"] = BY_SCHEMA[reference]
    elif not reference and operation in BY_OPERATION:
        content["example"] = BY_OPERATION[operation]


def is_binary(content: Json) -> bool:
    """Whether a media type is bytes, which have no example."""
    return bool(content.get("schema", {}).get("format") == "binary")
