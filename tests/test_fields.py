"""Every place that names the fields of a request, compared with the table in `jobs/fields.py`.

Lives above the packages' own tests because it reads all of them.
"""

import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from imagemill.cli import generate
from imagemill.client.fields import JobFields
from imagemill.commands import flags
from jobs.catalog import Defaults
from jobs.fields import FIELDS, FROM_MODEL, IN_REQUEST, PER_IMAGE, PER_JOB, PER_PROMPT, PROMPT
from jobs.request import ImageRequest
from service.openai.schemas import GenerateImages
from service.routes import page
from service.sdapi.schemas import TextToImage
from service.submit.schemas import ImageItem, ImageSettings, PromptItem, SubmitJob

ROOT = Path(__file__).parents[1]
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def facts(schema: dict[str, Any]) -> dict[str, Any]:
    """Type, bounds and description of a property, whether or not it may be null."""
    options = schema.get("anyOf", [schema])
    [kind] = [option for option in options if option.get("type") != "null"]
    return {**schema, **kind}


def expected(name: str) -> dict[str, Any]:
    """What a JSON schema must say of a field."""
    field = PROMPT if name == "prompt" else FIELDS[name]
    low, high = ("minLength", "maxLength") if field.kind is str else ("minimum", "maximum")
    wanted: dict[str, Any] = {"type": JSON_TYPES[field.kind]}
    if field.minimum is not None:
        wanted[low] = field.minimum
    if field.maximum is not None:
        wanted[high] = field.maximum
    if field.choices:
        wanted["enum"] = list(field.choices)
    return wanted


def check_schema(model: Any, names: dict[str, str]) -> None:
    """`names` maps the model's property to the field of the table."""
    properties = model.model_json_schema()["properties"]
    for property_name, name in names.items():
        have, wanted = facts(properties[property_name]), expected(name)
        assert {key: have.get(key) for key in wanted} == wanted, (model, property_name)


def test_the_request_has_the_fields_of_the_table() -> None:
    have = {item.name: item for item in fields(ImageRequest)}
    assert {"model", *IN_REQUEST} == set(have)
    hints = get_type_hints(ImageRequest)
    for name in IN_REQUEST:
        field = PROMPT if name == "prompt" else FIELDS[name]
        hint = hints[name]
        options = [hint] if get_origin(hint) is Literal else get_args(hint) or [hint]
        [kind] = [option for option in options if option is not type(None)]
        assert get_args(kind) == field.choices if field.choices else kind is field.kind, name
        assert (type(None) in options) == field.nullable, name
        if have[name].default is not MISSING:
            assert have[name].default == field.default, name


def test_the_catalog_has_a_default_for_each_field_that_the_model_decides() -> None:
    assert {item.name for item in fields(Defaults)} == set(FROM_MODEL)


@pytest.mark.parametrize("model", [ImageSettings, PromptItem])
def test_a_prompt_takes_its_fields(model: Any) -> None:
    own = {"prompt"} if model is PromptItem else set()
    assert set(model.model_fields) == {*PER_PROMPT, *own}
    check_schema(model, {name: name for name in model.model_fields})


def test_a_job_takes_all_fields() -> None:
    assert set(FIELDS) <= set(SubmitJob.model_fields)
    check_schema(SubmitJob, {name: name for name in FIELDS})
    described = SubmitJob.model_json_schema()["properties"]
    for name in PER_JOB:
        assert described[name]["description"] == FIELDS[name].help
        default = FIELDS[name].default
        assert default is None or SubmitJob.model_fields[name].default == default


def test_an_image_shows_its_fields() -> None:
    assert set(IN_REQUEST) <= set(ImageItem.model_fields)


def test_openai_takes_every_field() -> None:
    names = {name: name for name in FIELDS if name not in ("n", "format")}
    check_schema(GenerateImages, names)
    assert "output_format" in GenerateImages.model_fields


def test_a1111_takes_the_fields_that_it_has_a_name_for() -> None:
    names = {field.a1111: name for name, field in FIELDS.items() if field.a1111 and name != "seed"}
    check_schema(TextToImage, names)
    seed = facts(TextToImage.model_json_schema()["properties"]["seed"])
    assert (seed["minimum"], seed["maximum"]) == (-1, FIELDS["seed"].maximum)


def test_generate_has_a_flag_for_each_field() -> None:
    parameters = inspect.signature(generate).parameters
    for name in flags.SETTINGS:
        [kind, option] = get_args(parameters[name].annotation)
        assert get_args(kind)[0] is FIELDS[name].kind, name
        # within Annotated, typer takes the first name as `default`
        assert (option.default, option.help) == (FIELDS[name].flag, FIELDS[name].help)
    assert {*FIELDS} - {*flags.SETTINGS} == {"reproducible"}
    assert "fast" in parameters


def test_the_client_takes_each_field() -> None:
    assert set(FIELDS) <= set(JobFields.__annotations__)


def test_the_page_knows_the_same_fields() -> None:
    names = page._shipped()["names.js"].body.decode()
    lists = dict(re.findall(r"^export const (\w+) = (.*);$", names, re.MULTILINE))
    assert json.loads(lists["PER_IMAGE"]) == list(PER_IMAGE)
    assert {*json.loads(lists["PER_JOB"]), *PER_IMAGE} == set(IN_REQUEST)
    form = (ROOT / "service/web/compose.js").read_text()
    for name in FIELDS:
        assert re.search(rf"\b{name}\b", form), name


def test_the_docs_list_each_field() -> None:
    api = (ROOT / "docs/api.md").read_text()
    table = api[api.index("### POST /v1/jobs") :].split("\n**202**")[0]
    command = (ROOT / "docs/command.md").read_text()
    for name, field in FIELDS.items():
        [row] = [
            line
            for line in table.splitlines()
            if line.startswith("| `") and f"`{name}`" in line.split("|")[1]
        ]
        assert ("*" in row.split("|")[1]) == field.per_prompt, name
        assert (field.flag if name in flags.SETTINGS else "--fast") in command
        if field.per_prompt:
            assert f"`{name}`" in command


def test_the_page_and_the_command_cut_titles_at_the_same_length() -> None:
    form = (ROOT / "service/web/compose.js").read_text()
    assert f"const TITLE_LENGTH = {flags.TITLE_LENGTH};" in form
