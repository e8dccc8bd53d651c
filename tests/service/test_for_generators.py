"""The OpenAPI document's fitness for generators of clients, over all operations."""

import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from service.http.examples import BY_OPERATION, BY_PARAMETER, BY_SCHEMA
from service.http.for_generators import is_binary, request_schemas, subschemas
from tests.service.conftest import Deployment

Json = dict[str, Any]


@pytest.fixture(scope="module")
def document(deployment: Deployment) -> Json:
    return deployment.client.get("/openapi.json").json()


def operations(document: Json) -> Iterator[Json]:
    for methods in document["paths"].values():
        yield from methods.values()


def contents(operation: Json) -> Iterator[tuple[str, Json]]:
    """Media types of the body and of successful responses."""
    yield from operation.get("requestBody", {}).get("content", {}).items()
    for status, response in operation["responses"].items():
        if status < "300":
            yield from response.get("content", {}).items()


def test_operation_ids_are_unique_method_names(document: Json) -> None:
    ids = [operation["operationId"] for operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z]+([A-Z][a-z0-9]*)*", name) for name in ids), ids
    assert {"submitJob", "getJob", "getImage", "getArchive", "generateImages"} <= set(ids)


def test_requests_have_no_defaults(document: Json) -> None:
    bodies = request_schemas(document)
    assert {"SubmitJob", "PromptItem", "Webhook", "GenerateImages", "TextToImage"} <= bodies
    for name in bodies:
        for schema in subschemas(document["components"]["schemas"][name]):
            assert "default" not in schema, name
    for operation in operations(document):
        for parameter in operation.get("parameters", ()):
            assert all("default" not in schema for schema in subschemas(parameter["schema"]))


def test_defaults_are_described(document: Json) -> None:
    fields = document["components"]["schemas"]["SubmitJob"]["properties"]
    assert "Default: png." in fields["format"]["description"]
    assert "Default: true." in fields["reproducible"]["description"]
    parameters = document["paths"]["/v1/jobs"]["get"]["parameters"]
    limit = next(parameter for parameter in parameters if parameter["name"] == "limit")
    assert limit["description"] == "Default: 50."


def test_every_operation_has_its_examples(document: Json) -> None:
    for operation in operations(document):
        name = operation["operationId"]
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "path":
                assert "example" in parameter, (name, parameter["name"])
        for media_type, content in contents(operation):
            if media_type == "text/event-stream" and "application/json" in dict(
                contents(operation)
            ):
                continue  # the same response has a JSON example
            assert "example" in content or is_binary(content), (name, media_type)


def test_examples_match_their_schemas(document: Json) -> None:
    used = 0
    for operation in operations(document):
        for media_type, content in contents(operation):
            if "example" in content and "schema" in content:
                schema = {**content["schema"], "components": document["components"]}
                if media_type != "multipart/form-data":
                    jsonschema_rs.validate(schema, content["example"])
                    used += 1
    assert used > 25


def test_no_example_is_left_over(document: Json) -> None:
    schemas = document["components"]["schemas"]
    names = {operation["operationId"] for operation in operations(document)}
    parameters = {
        parameter["name"]
        for operation in operations(document)
        for parameter in operation.get("parameters", ())
    }
    assert set(BY_SCHEMA) <= set(schemas)
    assert set(BY_OPERATION) <= names
    assert set(BY_PARAMETER) <= parameters


def test_bytes_are_listed_as_octets_too(document: Json) -> None:
    binaries = 0
    for operation in operations(document):
        for status, response in operation["responses"].items():
            binary = {
                media_type: content["schema"]
                for media_type, content in response.get("content", {}).items()
                if is_binary(content)
            }
            if binary:
                binaries += 1
                assert status == "200" and "application/octet-stream" in binary
                for media_type, schema in binary.items():
                    assert schema["contentMediaType"] == media_type
    assert binaries >= 6
