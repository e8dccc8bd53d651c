"""A1111's API: what its clients send and expect."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from jobs.errors import InvalidRequest
from service.sdapi.pictures import texts
from tests.service.conftest import Deployment, picture, pointers, working
from tests.waiting import PATIENCE, wait_until

TXT2IMG = "/sdapi/v1/txt2img"
SAID = "a ring\nNegative prompt: blur\nSteps: 8, Seed: 7"
USUAL = {
    "prompt": "a red circle",
    "negative_prompt": "",
    "seed": -1,
    "steps": 5,
    "cfg_scale": 7,
    "width": 64,
    "height": 32,
    "batch_size": 1,
    "n_iter": 1,
    "sampler_name": "Euler a",
    "restore_faces": False,
    "tiling": False,
    "enable_hr": False,
    "styles": [],
    "override_settings": {"sd_model_checkpoint": "demo", "CLIP_stop_at_last_layers": 2},
    "override_settings_restore_afterwards": True,
    "alwayson_scripts": {},
    "save_images": False,
    "send_images": True,
}


def test_typical_client_request(deployment: Deployment) -> None:
    with working(deployment) as leases:
        response = deployment.client.post(TXT2IMG, json={**USUAL, "batch_size": 2, "n_iter": 2})
    assert response.status_code == 200, response.text
    body = response.json()
    assert [base64.b64decode(image) for image in body["images"]] == [
        picture(64, 32, index) for index in range(4)
    ]
    info = json.loads(body["info"])
    seeds = [lease.request.seed for lease in sorted(leases, key=lambda lease: lease.index)]
    assert (info["all_seeds"], info["seed"]) == (seeds, seeds[0])
    assert info["ignored"] == [
        "CLIP_stop_at_last_layers",
        "override_settings_restore_afterwards",
        "sampler_name",
        "save_images",
    ]
    assert body["parameters"]["cfg_scale"] == 7
    request = leases[0].request
    assert (request.steps, request.guidance_scale, request.width) == (5, 7, 64)


def test_minimal_request(deployment: Deployment) -> None:
    with working(deployment) as leases:
        response = deployment.client.post(TXT2IMG, json={"prompt": "a", "seed": 7})
    assert len(response.json()["images"]) == 1
    assert (leases[0].request.seed, leases[0].request.steps) == (7, 8)


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"prompt": "x" * 10_001}, "/prompt"),
        ({"prompt": "\0"}, "/prompt"),
        ({"width": 100}, "/width"),
        ({"steps": 101}, "/steps"),
        ({"cfg_scale": 99}, "/cfg_scale"),
        ({"seed": -2}, "/seed"),
        ({"batch_size": 51}, "/batch_size"),
        ({"batch_size": 10_000, "n_iter": 10_000}, "/n_iter"),
        ({"enable_hr": True}, "/enable_hr"),
        ({"restore_faces": True}, "/restore_faces"),
        ({"tiling": 1}, "/tiling"),
        ({"steps": "many"}, "/steps"),
        ({"steps": 4.5}, "/steps"),
        ({"script_name": "x/y plot"}, "/script_name"),
        ({"styles": ["oil"]}, "/styles"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"enabled": True}]}}}, "/alwayson_scripts"),
        ({"alwayson_scripts": {"controlnet": {"args": [{}]}}}, "/alwayson_scripts"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, "/alwayson_scripts"),
        ({"alwayson_scripts": {"x": "y"}}, "/alwayson_scripts"),
        ({"override_settings": {"sd_model_checkpoint": 7}}, "/override_settings"),
    ],
)
def test_unsupported_fields_are_refused(deployment: Deployment, fields: dict, pointer: str) -> None:
    response = deployment.client.post(TXT2IMG, json={**USUAL, **fields})
    assert (response.status_code, pointers(response)) == (422, [pointer])
    assert response.json()["detail"]


def test_values_are_read_as_leniently_as_a1111_reads_them(deployment: Deployment) -> None:
    lenient = {
        "prompt": "",
        "seed": "7",
        "steps": "4",
        "cfg_scale": "1.5",
        "width": 64.0,
        "height": "32",
        "batch_size": None,
        "tiling": 0,
        "script_name": "None",
        "script_args": [],
        "alwayson_scripts": {
            "controlnet": {"args": [{"enabled": False}]},
            "ADetailer": {"args": [False, True, {"ad_model": "x"}]},
            "empty": {"args": []},
        },
    }
    with working(deployment) as leases:
        response = deployment.client.post(TXT2IMG, json={**USUAL, **lenient})
    assert response.status_code == 200, response.text
    (request,) = [lease.request for lease in leases]
    assert (request.prompt, request.seed, request.steps) == ("", 7, 4)
    assert (request.guidance_scale, request.width, request.height) == (1.5, 64, 32)


def test_lone_surrogate_is_refused_anywhere(deployment: Deployment) -> None:
    for extra in ('"anything": ["\\ud800"]', '"override_settings": {"x": "\\uDFFF"}'):
        response = deployment.client.post(
            TXT2IMG,
            content='{"prompt": "a", ' + extra + "}",
            headers={"content-type": "application/json"},
        )
        assert response.status_code in (400, 422), response.text


def test_unknown_checkpoint_is_404(deployment: Deployment) -> None:
    body = {"prompt": "a", "override_settings": {"sd_model_checkpoint": "nope"}}
    response = deployment.client.post(TXT2IMG, json=body)
    assert (response.status_code, "demo" in response.json()["detail"]) == (404, True)


def test_failure_is_502(deployment: Deployment) -> None:
    with working(deployment, deployment.worker.fail):
        response = deployment.client.post(TXT2IMG, json={"prompt": "a"})
    assert (response.status_code, "it would not" in response.json()["detail"]) == (502, True)


def test_progress_and_interrupt(fresh: Deployment) -> None:
    quiet = fresh.client.get("/sdapi/v1/progress").json()
    assert (quiet["progress"], quiet["state"]["job_count"]) == (0, 0)
    other = fresh.submit("not an sdapi job")
    (first,) = fresh.worker.claim(1)
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a", "batch_size": 2}
        waiting = pool.submit(fresh.client.post, TXT2IMG, json=body)
        (lease,) = wait_until(fresh.worker.claim)
        fresh.store.beat("hand", {(lease.key, lease.token): 4}, 60)
        drawn = picture(16, 16)
        fresh.images.write(lease.job_id, lease.index, "preview", drawn, ".jpg")
        seen = fresh.client.get("/sdapi/v1/progress").json()
        assert seen["progress"] == 0.25
        assert (seen["state"]["sampling_step"], seen["state"]["sampling_steps"]) == (4, 8)
        assert base64.b64decode(seen["current_image"]) == drawn
        bare = fresh.client.get("/sdapi/v1/progress?skip_current_image=true").json()
        assert bare["current_image"] is None
        fresh.worker.finish(lease)
        assert fresh.client.post("/sdapi/v1/interrupt").json() == {}
        response = waiting.result(PATIENCE)
    assert (response.status_code, len(response.json()["images"])) == (200, 1)
    assert fresh.job(other["id"])["state"] == "running"
    fresh.worker.finish(first)


def test_interrupt_before_the_first_image_is_a_conflict(fresh: Deployment) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fresh.client.post, TXT2IMG, json={"prompt": "a"})
        wait_until(fresh.worker.claim)
        fresh.client.post("/sdapi/v1/interrupt")
        response = waiting.result(PATIENCE)
    assert (response.status_code, "interrupted" in response.json()["detail"]) == (409, True)


def test_progress_and_interrupt_of_one_task(fresh: Deployment) -> None:
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(fresh.client.post, TXT2IMG, json={"prompt": task, "force_task_id": task})
            for task in ("one", "two")
        ]
        leases = wait_until(lambda: fresh.store.queue_depth().get("demo", {}).get(5) == 2) and (
            fresh.worker.claim(2)
        )
        (second,) = [lease for lease in leases if lease.request.prompt == "two"]
        fresh.store.beat("hand", {(second.key, second.token): 4}, 60)
        seen = fresh.client.get("/sdapi/v1/progress?id_task=two").json()
        assert seen["state"]["sampling_step"] == 4
        assert fresh.client.get("/sdapi/v1/progress?id_task=three").json()["progress"] == 0
        followed = fresh.client.post("/internal/progress", json={"id_task": "two"}).json()
        assert (followed["active"], followed["progress"]) == (True, 0.5)
        fresh.client.post("/sdapi/v1/interrupt?id_task=two")
        assert waiting[1].result(PATIENCE).status_code == 409
        (first,) = [lease for lease in leases if lease.request.prompt == "one"]
        fresh.worker.finish(first)
        assert waiting[0].result(PATIENCE).status_code == 200
    done = fresh.client.post("/internal/progress", json={"id_task": "one"}).json()
    assert (done["active"], done["completed"]) == (False, True)
    unknown = fresh.client.post("/internal/progress", json={"id_task": "three"}).json()
    assert unknown["completed"] is False


def test_interrupt_stops_only_the_running_image(fresh: Deployment) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fresh.client.post, TXT2IMG, json={"prompt": "first"})
        (_lease,) = wait_until(fresh.worker.claim)
        second = pool.submit(fresh.client.post, TXT2IMG, json={"prompt": "second"})
        wait_until(fresh.store.queue_depth)
        assert fresh.client.post("/sdapi/v1/skip").json() == {}
        assert first.result(PATIENCE).status_code == 409
        fresh.worker.finish_all()
        assert second.result(PATIENCE).status_code == 200


def test_skip_of_one_image_of_several_is_refused(fresh: Deployment) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fresh.client.post, TXT2IMG, json={"prompt": "a", "n_iter": 2})
        (lease,) = wait_until(fresh.worker.claim)
        assert fresh.client.post("/sdapi/v1/skip").status_code == 409
        fresh.worker.finish(lease)
        assert fresh.client.post("/sdapi/v1/skip").status_code == 200
        assert len(waiting.result(PATIENCE).json()["images"]) == 1


def test_catalog_as_checkpoints(deployment: Deployment) -> None:
    checkpoints = deployment.client.get("/sdapi/v1/sd-models").json()
    assert [checkpoint["model_name"] for checkpoint in checkpoints] == ["demo", "distilled", "idle"]
    assert {"title", "hash", "sha256", "filename", "config"} <= set(checkpoints[0])


def test_png_info(deployment: Deployment) -> None:
    parameters = (
        'a, b: c\nline two\nNegative prompt: blur\nSteps: 8, Seed: 7, Size: 64x32, Model: "x, y"'
    )
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", parameters)
    chunks.add_itxt("imagemill", "{}")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=chunks)
    text = base64.b64encode(buffer.getvalue()).decode()
    lines = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for image in (text, f"data:image/png;base64,{text}", lines, f"data:image/png;base64,{lines}"):
        sent = {"image": image, "include_init_images": False}
        info = deployment.client.post("/sdapi/v1/png-info", json=sent).json()
        assert (info["info"], info["items"]) == (parameters, {"imagemill": "{}"})
        assert info["parameters"] == {
            "Prompt": "a, b: c\nline two",
            "Negative prompt": "blur",
            "Steps": "8",
            "Seed": "7",
            "Size": "64x32",
            "Model": '"x, y"',
        }


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize(
    "comment", [b"UNICODE\0" + SAID.encode("utf-16-be"), b"ASCII\0\0\0" + SAID.encode()]
)
def test_png_info_of_jpeg_and_webp(deployment: Deployment, kind: str, comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, exif=exif.tobytes())
    image = base64.b64encode(buffer.getvalue()).decode()
    info = deployment.client.post("/sdapi/v1/png-info", json={"image": image}).json()
    assert (info["info"], info["parameters"]["Seed"]) == (SAID, "7")


@pytest.mark.parametrize(
    "image", ["!", "AAAA", "data:image/png;base64,", "data:,x", picture(8, 8)[:40].hex()]
)
def test_invalid_image_is_422(deployment: Deployment, image: str) -> None:
    response = deployment.client.post("/sdapi/v1/png-info", json={"image": image})
    assert (response.status_code, pointers(response)) == (422, ["/image"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@given(where=st.integers(0, 200), what=st.binary(min_size=1, max_size=8))
@settings(max_examples=60)
def test_no_image_causes_an_internal_error(kind: str, where: int, what: bytes) -> None:
    chunks, exif = PngImagePlugin.PngInfo(), Image.Exif()
    chunks.add_text("parameters", "x" * 50, zip=True)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + b"\0x" * 9
    buffer = io.BytesIO()
    more = {"pnginfo": chunks} if kind == "PNG" else {"exif": exif.tobytes()}
    Image.new("RGB", (8, 8)).save(buffer, kind, **more)
    data = buffer.getvalue()
    with suppress(InvalidRequest):
        texts(data[:where] + what + data[where + len(what) :])


def test_image_without_parameters(deployment: Deployment) -> None:
    image = base64.b64encode(picture()).decode()
    info = deployment.client.post("/sdapi/v1/png-info", json={"image": image}).json()
    assert info == {"info": "", "items": {}, "parameters": {}}
