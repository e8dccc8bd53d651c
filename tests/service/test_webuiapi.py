"""The `webuiapi` client, on which many tools are built, against a running service."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from webuiapi import WebUIApi

from jobs.runtime.embedded_queue import EmbeddedServer
from service.keys import KeyRing
from tests.service.conftest import Deployment, deployed, working
from tests.service.live import listening
from tests.waiting import PATIENCE, wait_until


@pytest.fixture(scope="module")
def live(
    server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, WebUIApi]]:
    with (
        deployed(server.url, tmp_path_factory.mktemp("webui"), start=False) as service,
        listening(service.client.app) as address,
    ):
        api = WebUIApi(host="127.0.0.1", port=int(address.rpartition(":")[2]))
        yield service, api
        api.session.close()


def test_txt2img_as_the_client_sends_it(live: tuple[Deployment, WebUIApi]) -> None:
    deployment, api = live
    with working(deployment) as leases:
        response = api.txt2img(
            prompt="a red circle",
            negative_prompt="blue",
            seed=1003,
            steps=8,
            cfg_scale=3,
            width=64,
            height=48,
            batch_size=2,
        )
    assert [image.size for image in response.images] == [(64, 48), (64, 48)]
    assert response.image.size == (64, 48)
    assert response.info["all_seeds"] == [1003, 1004]
    assert response.parameters["steps"] == 8
    assert leases[0].request.negative_prompt == "blue"


def test_progress_and_interrupt(live: tuple[Deployment, WebUIApi]) -> None:
    deployment, api = live
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.txt2img, prompt="a", steps=8, width=64, height=64, batch_size=2)
        (lease,) = wait_until(deployment.worker.claim)
        deployment.store.beat("hand", {(lease.key, lease.token): 4}, 60)
        seen = wait_until(lambda: api.get_progress())
        assert (seen["progress"], seen["state"]["job_count"]) == (0.25, 2)
        deployment.worker.finish(lease)
        assert api.interrupt() == {}
        assert len(waiting.result(PATIENCE).images) == 1
    assert api.get_progress()["progress"] == 0


def test_models_and_png_info(live: tuple[Deployment, WebUIApi]) -> None:
    _, api = live
    assert api.util_get_model_names() == ["demo", "distilled", "idle"]
    picture = Image.new("RGB", (8, 8))
    picture.info["parameters"] = "a ring\nSteps: 8, Seed: 7"
    assert api.png_info(picture).info == "a ring\nSteps: 8, Seed: 7"


def test_client_gets_the_error(live: tuple[Deployment, WebUIApi]) -> None:
    _, api = live
    with pytest.raises(RuntimeError, match="422"):
        api.txt2img(prompt="a", width=100, height=64)


def test_key_as_basic_password(server: EmbeddedServer, tmp_path: Path) -> None:
    key, record = KeyRing(tmp_path / "keys.json").add("alice")
    with (
        deployed(server.url, tmp_path, start=False) as deployment,
        listening(deployment.client.app) as address,
    ):
        api = WebUIApi(host="127.0.0.1", port=int(address.rpartition(":")[2]))
        with pytest.raises(RuntimeError, match="401"):
            api.txt2img(prompt="a", steps=8, width=64, height=64)
        api.set_auth("anybody", key)
        with working(deployment):
            response = api.txt2img(prompt="a", steps=8, width=64, height=64)
        assert api.util_get_model_names() == ["demo", "distilled", "idle"]
        elsewhere = api.session.get(f"{address}/v1/jobs")
        api.set_auth(key, "not the key")
        with pytest.raises(RuntimeError, match="401"):
            api.txt2img(prompt="a", steps=8, width=64, height=64)
        api.session.close()
    assert (response.image.size, elsewhere.status_code) == ((64, 64), 401)
    (made,) = deployment.store.jobs("alice")[0]
    assert made.metadata == {"api": "sdapi", "session": record.id}


def test_a_chosen_model_is_used(live: tuple[Deployment, WebUIApi]) -> None:
    deployment, api = live
    assert api.util_get_current_model() == "demo"
    api.util_set_model("distilled")
    assert api.util_get_current_model() == "distilled"
    with working(deployment, model="distilled") as leases:
        api.txt2img(prompt="a", steps=4, width=64, height=64)
    assert len(leases) == 1
    api.util_set_model("demo")


def test_lists(live: tuple[Deployment, WebUIApi]) -> None:
    _, api = live
    assert api.util_get_sampler_names() == ["Default"]
    assert api.util_get_scheduler_names() == ["automatic"]
    assert api.get_loras() == api.get_sd_vae() == api.get_prompt_styles() == []
    assert api.get_cmd_flags()["api"] is True
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_embeddings()["loaded"] == {}


def test_img2img_is_refused_clearly(live: tuple[Deployment, WebUIApi]) -> None:
    _, api = live
    with pytest.raises(RuntimeError, match="images are made from text only; use txt2img"):
        api.img2img(images=[Image.new("RGB", (8, 8))], prompt="a")


def test_progress_without_a_job(live: tuple[Deployment, WebUIApi]) -> None:
    _, api = live
    api.util_wait_for_ready(check_interval=0.01)
    assert api.get_progress()["progress"] == 0
