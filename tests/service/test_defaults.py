"""A model's own defaults, as a worker publishes them in its card, and what they do over HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.catalog import Catalog, Defaults, Model
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.service.conftest import Deployment, deployed

OWN = {"width": 64, "height": 32, "steps": 4, "guidance_scale": 0.0}
TURBO = Model("turbo", "owner/turbo", unset=tuple(OWN))
STEPS = Model("steps", "owner/turbo", defaults=Defaults(steps=6), unset=("width", "height"))


@pytest.fixture
def open_mill(server: EmbeddedServer, tmp_path: Path) -> Iterator[Deployment]:
    """A service whose entries leave defaults to the model."""
    catalog = Catalog({model.name: model for model in (TURBO, STEPS)})
    with deployed(server.url, tmp_path, catalog=catalog) as found:
        yield found


def publish(mill: Deployment, model: str, source: str = "owner/turbo", **more: object) -> None:
    mill.store.publish_card(model, {"source": source, "defaults": OWN, **more})


def test_nothing_is_queued_while_a_needed_default_is_unknown(open_mill: Deployment) -> None:
    body = {"model": "turbo", "prompts": ["a", {"prompt": "b", "steps": 3}], "width": 48}
    answer = open_mill.client.post("/v1/jobs", json=body)
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:imagemill:problem:not-ready"
    assert "default height, steps, guidance_scale isn't known" in answer.json()["detail"]
    assert answer.headers["Retry-After"]
    assert open_mill.client.get("/v1/jobs").json()["data"] == []
    image = {"model": "turbo", "prompt": "a"}
    refused = open_mill.client.post("/v1/images/generations", json=image)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")


def test_a_request_that_sets_everything_needs_no_defaults(open_mill: Deployment) -> None:
    [image] = open_mill.submit("a", **{**OWN, "model": "turbo"})["images"]
    assert {name: image[name] for name in OWN} == OWN


def test_what_a_worker_published_fills_what_the_entry_leaves_open(open_mill: Deployment) -> None:
    for model, steps, scale in (("turbo", 4, 0.0), ("steps", 6, 3.5)):
        publish(open_mill, model)
        [image] = open_mill.submit("a", model=model)["images"]
        shown = open_mill.client.get(f"/v1/models/{model}").json()["defaults"]
        expected = {**OWN, "steps": steps, "guidance_scale": scale}
        assert {name: image[name] for name in OWN} == expected
        assert shown == {**expected, "negative_prompt": None}


def test_the_defaults_of_other_weights_are_not_used(open_mill: Deployment) -> None:
    publish(open_mill, "turbo", source="owner/before")
    body = {"model": "turbo", "prompts": ["a"]}
    assert open_mill.client.post("/v1/jobs", json=body).status_code == 503
    shown = open_mill.client.get("/v1/models").json()["data"][0]["defaults"]
    assert shown == {**dict.fromkeys(OWN), "negative_prompt": None}


def test_a_negative_prompt_is_judged_by_the_models_own_guidance(open_mill: Deployment) -> None:
    publish(open_mill, "turbo", guidance="classifier-free")
    [warning] = open_mill.submit("a", model="turbo", negative_prompt="blur")["warnings"]
    assert "no effect without a guidance_scale above 1: /prompts/0" in warning


def test_a_default_outside_the_cards_grid_is_named(open_mill: Deployment) -> None:
    publish(open_mill, "turbo", multiple=64)
    answer = open_mill.client.post("/v1/jobs", json={"model": "turbo", "prompts": ["a"]})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["detail"] == "height must be a multiple of 64"
