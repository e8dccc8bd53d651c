"""The requests of Open WebUI and SillyTavern, in their order and with their headers and fields."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.catalog import Catalog, Defaults, Model
from jobs.runtime.embedded_queue import EmbeddedServer
from service.keys import KeyRing
from service.sdapi.sessions import INTERRUPT_SECONDS, Sessions
from tests import web
from tests.service.conftest import Deployment, deployed, picture, working
from tests.service.live import leaving, listening
from tests.waiting import PATIENCE, wait_until

MODELS = Catalog(
    {
        name: Model(name, "/nowhere", defaults=Defaults(512, 512, 20, 7))
        for name in ("first", "second")
    }
)
EMPTY = {"Authorization": "Basic"}
"""What a server reads while their user has set no password: they send a space after it."""


@pytest.fixture(scope="module")
def live(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A service with two models of usual sizes, and a client that sends an empty password."""
    folder = tmp_path_factory.mktemp("clients")
    with (
        deployed(server.url, folder, start=False, catalog=MODELS) as service,
        listening(service.client.app) as address,
        web.Client(base_url=address, timeout=PATIENCE, headers=EMPTY) as client,
    ):
        service.client = client
        yield service


def get(deployment: Deployment, name: str) -> object:
    """What a GET of A1111's API answers; it must succeed."""
    response = deployment.client.get(f"/sdapi/v1/{name}")
    assert response.status_code == 200, (name, response.text)
    return response.json()


def post(deployment: Deployment, name: str, body: object) -> object:
    """What a POST of A1111's API answers; it must succeed."""
    response = deployment.client.post(f"/sdapi/v1/{name}", json=body)
    assert response.status_code == 200, (name, response.text)
    return response.json()


def test_open_webui(live: Deployment) -> None:
    get(live, "options")  # its administrator verifies the URL
    models = get(live, "sd-models")
    assert [(model["title"], model["model_name"]) for model in models] == [
        ("first", "first"),
        ("second", "second"),
    ]
    options = get(live, "options")
    assert options["sd_model_checkpoint"] == "first"
    options["sd_model_checkpoint"] = "second"  # the administrator chooses a model
    post(live, "options", options)
    for _ in range(2):  # before every image it reads the model
        assert get(live, "options")["sd_model_checkpoint"] == "second"
        wish = {
            "prompt": "a red circle",
            "batch_size": 1,
            "width": 512,
            "height": 512,
            "steps": 50,
            "cfg_scale": 7.5,
            "sampler_name": "Euler a",
            "scheduler": "Automatic",
        }
        with working(live, model="second") as leases:
            images = post(live, "txt2img", wish)["images"]
        assert [base64.b64decode(image) for image in images] == [picture(512, 512)]
        (request,) = [lease.request for lease in leases]
        assert (request.model, request.steps, request.guidance_scale) == ("second", 50, 7.5)
    post(live, "options", {"sd_model_checkpoint": "first"})


def sillytavern_request(prompt: str) -> dict[str, object]:
    """The body of its txt2img, with the settings of a fresh installation."""
    return {
        "url": "http://localhost:8000",
        "auth": "",
        "prompt": prompt,
        "negative_prompt": "lowres, bad anatomy",
        "sampler_name": "Default",
        "scheduler": "automatic",
        "steps": 20,
        "cfg_scale": 7,
        "width": 512,
        "height": 512,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "None",
        "hr_scale": 1.5,
        "hr_additional_modules": [],
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }


def test_sillytavern(live: Deployment) -> None:
    get(live, "options")  # it connects, then fills its menus
    assert [item["name"] for item in get(live, "samplers")] == ["Default"]
    assert [item["name"] for item in get(live, "schedulers")] == ["automatic"]
    assert [item["name"] for item in get(live, "upscalers")] == ["None"]
    assert [item["name"] for item in get(live, "latent-upscale-modes")] == []
    assert [item["model_name"] for item in get(live, "sd-vae")] == []
    titles = [model["title"] for model in get(live, "sd-models")]
    post(live, "options", {"sd_model_checkpoint": titles[1]})
    state = get(live, "progress")  # it waits until the model has been loaded
    assert (state["progress"], state["state"]["job_count"]) == (0, 0)
    assert get(live, "options")["sd_model_checkpoint"] == titles[1]
    with working(live, model=titles[1]):
        made = post(live, "txt2img", sillytavern_request("a knight"))
    assert base64.b64decode(made["images"][0]) == picture(512, 512)
    post(live, "options", {"sd_model_checkpoint": titles[0]})


def test_sillytavern_gives_up_one_of_two_images(live: Deployment) -> None:
    address = str(live.client.base_url)
    with ThreadPoolExecutor(1) as pool:
        left = sillytavern_request("unwanted")
        with leaving(address, "/sdapi/v1/txt2img", left, **EMPTY):
            (unwanted,) = wait_until(lambda: live.worker.claim(1, "first"))
            kept = pool.submit(post, live, "txt2img", sillytavern_request("wanted"))
            (wanted,) = wait_until(lambda: live.worker.claim(1, "first"))
        wait_until(lambda: live.store.job(unwanted.job_id, None).state == "cancelled")
        assert post(live, "interrupt", None) == {}
        live.worker.finish(wanted)
        assert len(kept.result(PATIENCE)["images"]) == 1


def test_a_choice_is_kept_per_key(server: EmbeddedServer, tmp_path: object) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    alice, bob = ring.add("shared")[0], ring.add("shared")[0]
    path = "/sdapi/v1/options"
    for choice in ({"sd_model_checkpoint": "second"}, {}):  # kept across a restart
        with deployed(server.url, tmp_path, catalog=MODELS) as service:
            service.client.post(path, json=choice, auth=("any", alice))
            chosen = [
                service.client.get(path, auth=("any", key)).json()["sd_model_checkpoint"]
                for key in (alice, bob)
            ]
        assert chosen == ["second", "first"]


def test_an_unknown_model_is_refused(live: Deployment) -> None:
    refused = live.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "v1-5.ckpt"})
    assert (refused.status_code, refused.json()["known"]) == (404, ["first", "second"])
    ignored = post(live, "options", {"CLIP_stop_at_last_layers": 2, "sd_vae": "Automatic"})
    assert ignored == {"ignored": ["CLIP_stop_at_last_layers"]}


def test_a_choice_that_the_catalog_has_lost_is_dropped(
    server: EmbeddedServer, tmp_path: object
) -> None:
    seen = []
    for catalog in (MODELS, Catalog({"first": MODELS.get("first")})):
        with deployed(server.url, tmp_path, catalog=catalog) as service:
            if not seen:
                choice = {"sd_model_checkpoint": "second"}
                service.client.post("/sdapi/v1/options", json=choice)
            seen.append(service.client.get("/sdapi/v1/options").json()["sd_model_checkpoint"])
    assert seen == ["second", "first"]


def test_each_departure_accounts_for_one_interrupt(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(tmp_path)
    sessions.note_departure("a")
    assert not sessions.take_departure("b")
    assert (sessions.take_departure("a"), sessions.take_departure("a")) == (True, False)
    sessions.note_departure("a")
    monkeypatch.setattr("service.sdapi.sessions.INTERRUPT_SECONDS", -INTERRUPT_SECONDS)
    assert not sessions.take_departure("a")


@pytest.mark.parametrize(
    "name",
    [
        *("cmd-flags", "config", "embeddings", "extensions", "face-restorers", "hypernetworks"),
        *("latent-upscale-modes", "loras", "memory", "prompt-styles", "realesrgan-models"),
        *("samplers", "schedulers", "script-info", "scripts", "sd-modules", "sd-vae", "upscalers"),
    ],
)
def test_lists_that_plugins_read(live: Deployment, name: str) -> None:
    path = "/config" if name == "config" else f"/sdapi/v1/{name}"
    response = live.client.get(path)
    assert response.status_code == 200 and isinstance(response.json(), list | dict)


def test_refreshing_succeeds_and_pictures_as_input_are_refused(live: Deployment) -> None:
    for name in ("checkpoints", "vae", "loras", "embeddings"):
        assert post(live, f"refresh-{name}", None) == {}
    for name in ("img2img", "extra-single-image", "extra-batch-images", "interrogate"):
        response = live.client.post(f"/sdapi/v1/{name}", json={"init_images": ["AAAA"]})
        assert response.status_code == 422
        assert "use txt2img" in response.json()["detail"]
