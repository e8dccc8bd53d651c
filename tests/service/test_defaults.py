"""A model's own defaults, as published in its card, and their effect over HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.catalog import Catalog, Defaults, Model
from jobs.reports import Card, ModelCard
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.service.conftest import Deployment, card, deployed

OWN = {"width": 64, "height": 32, "steps": 4, "guidance_scale": 0.0}
TURBO = Model("turbo", "owner/turbo", unset=tuple(OWN))
STEPS = Model("steps", "owner/turbo", defaults=Defaults(steps=6), unset=("width", "height"))


@pytest.fixture
def open_deployment(server: EmbeddedServer, tmp_path: Path) -> Iterator[Deployment]:
    """A service whose catalog entries leave defaults to the model."""
    catalog = Catalog({model.name: model for model in (TURBO, STEPS)})
    with deployed(server.url, tmp_path, catalog=catalog) as service:
        yield service


def publish(
    deployment: Deployment,
    model: str,
    source: str = "owner/turbo",
    properties: Card | None = None,
) -> None:
    deployment.store.publish_card(model, ModelCard(source, OWN, properties))


def test_nothing_is_queued_while_a_required_default_is_unknown(open_deployment: Deployment) -> None:
    body = {"model": "turbo", "prompts": ["a", {"prompt": "b", "steps": 3}], "width": 48}
    response = open_deployment.client.post("/v1/jobs", json=body)
    assert response.status_code == 503
    assert response.json()["type"] == "urn:imagemill:problem:not-ready"
    assert "default height, steps, guidance_scale isn't known" in response.json()["detail"]
    assert response.headers["Retry-After"]
    assert open_deployment.client.get("/v1/jobs").json()["data"] == []
    image = {"model": "turbo", "prompt": "a"}
    refused = open_deployment.client.post("/v1/images/generations", json=image)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")


def test_request_with_all_fields_needs_no_defaults(open_deployment: Deployment) -> None:
    [image] = open_deployment.submit("a", **{**OWN, "model": "turbo"})["images"]
    assert {name: image[name] for name in OWN} == OWN


def test_published_defaults_fill_missing_ones(
    open_deployment: Deployment,
) -> None:
    for model, steps, scale in (("turbo", 4, 0.0), ("steps", 6, 3.5)):
        publish(open_deployment, model)
        [image] = open_deployment.submit("a", model=model)["images"]
        defaults = open_deployment.client.get(f"/v1/models/{model}").json()["defaults"]
        expected = {**OWN, "steps": steps, "guidance_scale": scale}
        assert {name: image[name] for name in OWN} == expected
        assert defaults == {**expected, "negative_prompt": None}


def test_defaults_of_other_weights_are_ignored(open_deployment: Deployment) -> None:
    publish(open_deployment, "turbo", source="owner/before")
    body = {"model": "turbo", "prompts": ["a"]}
    assert open_deployment.client.post("/v1/jobs", json=body).status_code == 503
    defaults = open_deployment.client.get("/v1/models").json()["data"][0]["defaults"]
    assert defaults == {**dict.fromkeys(OWN), "negative_prompt": None}


def test_negative_prompt_warning_uses_published_guidance(
    open_deployment: Deployment,
) -> None:
    properties = card(guidance="classifier-free").properties
    publish(open_deployment, "turbo", properties=properties)
    [warning] = open_deployment.submit("a", model="turbo", negative_prompt="blur")["warnings"]
    assert "no effect without a guidance_scale above 1: /prompts/0" in warning


def test_default_off_the_grid_is_reported(open_deployment: Deployment) -> None:
    publish(open_deployment, "turbo", properties=card(multiple=64).properties)
    response = open_deployment.client.post("/v1/jobs", json={"model": "turbo", "prompts": ["a"]})
    assert response.status_code == 422
    assert response.json()["errors"][0]["detail"] == "height must be a multiple of 64"
