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


def test_what_its_clients_usually_send(mill: Deployment) -> None:
    with working(mill) as leases:
        answer = mill.client.post(TXT2IMG, json={**USUAL, "batch_size": 2, "n_iter": 2})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [base64.b64decode(one) for one in body["images"]] == [
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


def test_the_least_that_can_be_asked(mill: Deployment) -> None:
    with working(mill) as leases:
        answer = mill.client.post(TXT2IMG, json={"prompt": "a", "seed": 7})
    assert len(answer.json()["images"]) == 1
    assert (leases[0].request.seed, leases[0].request.steps) == (7, 8)


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"prompt": ""}, "/prompt"),
        ({"prompt": " "}, "/prompt"),
        ({"width": 100}, "/width"),
        ({"steps": 101}, "/steps"),
        ({"cfg_scale": 99}, "/cfg_scale"),
        ({"seed": -2}, "/seed"),
        ({"batch_size": 51}, "/batch_size"),
        ({"batch_size": 10_000, "n_iter": 10_000}, "/batch_size"),
        ({"enable_hr": True}, "/enable_hr"),
        ({"restore_faces": True}, "/restore_faces"),
        ({"tiling": 0}, "/tiling"),
        ({"script_name": "x/y plot"}, "/script_name"),
        ({"styles": ["oil"]}, "/styles"),
        ({"alwayson_scripts": {"controlnet": {}}}, "/alwayson_scripts"),
        ({"override_settings": {"sd_model_checkpoint": 7}}, "/override_settings"),
    ],
)
def test_what_we_do_not_do_is_refused(mill: Deployment, fields: dict, pointer: str) -> None:
    answer = mill.client.post(TXT2IMG, json={**USUAL, **fields})
    assert (answer.status_code, pointers(answer)) == (422, [pointer])
    assert answer.json()["detail"]


def test_half_a_surrogate_pair_is_refused_wherever_it_is(mill: Deployment) -> None:
    for extra in ('"anything": ["\\ud800"]', '"override_settings": {"x": "\\uDFFF"}'):
        answer = mill.client.post(
            TXT2IMG,
            content='{"prompt": "a", ' + extra + "}",
            headers={"content-type": "application/json"},
        )
        assert answer.status_code in (400, 422), answer.text


def test_an_unknown_checkpoint_is_404(mill: Deployment) -> None:
    body = {"prompt": "a", "override_settings": {"sd_model_checkpoint": "nope"}}
    answer = mill.client.post(TXT2IMG, json=body)
    assert (answer.status_code, "demo" in answer.json()["detail"]) == (404, True)


def test_a_failure_is_502(mill: Deployment) -> None:
    with working(mill, mill.worker.fail):
        answer = mill.client.post(TXT2IMG, json={"prompt": "a"})
    assert (answer.status_code, "it would not" in answer.json()["detail"]) == (502, True)


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
        answer = waiting.result(PATIENCE)
    assert (answer.status_code, len(answer.json()["images"])) == (200, 1)
    assert fresh.job(other["id"])["state"] == "running"
    fresh.worker.finish(first)


def test_the_catalog_as_checkpoints(mill: Deployment) -> None:
    found = mill.client.get("/sdapi/v1/sd-models").json()
    assert [one["model_name"] for one in found] == ["demo", "distilled", "idle"]
    assert {"title", "hash", "sha256", "filename", "config"} <= set(found[0])


def test_a_picture_tells_how_it_was_made(mill: Deployment) -> None:
    said = 'a, b: c\nline two\nNegative prompt: blur\nSteps: 8, Seed: 7, Size: 64x32, Model: "x, y"'
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", said)
    chunks.add_itxt("imagemill", "{}")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=chunks)
    text = base64.b64encode(buffer.getvalue()).decode()
    for image in (text, f"data:image/png;base64,{text}"):
        found = mill.client.post("/sdapi/v1/png-info", json={"image": image}).json()
        assert (found["info"], found["items"]) == (said, {"imagemill": "{}"})
        assert found["parameters"] == {
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
def test_a_jpeg_and_a_webp_tell_it_in_their_exif(
    mill: Deployment, kind: str, comment: bytes
) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, exif=exif.tobytes())
    image = base64.b64encode(buffer.getvalue()).decode()
    found = mill.client.post("/sdapi/v1/png-info", json={"image": image}).json()
    assert (found["info"], found["parameters"]["Seed"]) == (SAID, "7")


@pytest.mark.parametrize(
    "image", ["!", "AAAA", "data:image/png;base64,", "data:,x", picture(8, 8)[:40].hex()]
)
def test_what_is_no_picture_is_422(mill: Deployment, image: str) -> None:
    answer = mill.client.post("/sdapi/v1/png-info", json={"image": image})
    assert (answer.status_code, pointers(answer)) == (422, ["/image"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@given(where=st.integers(0, 200), what=st.binary(min_size=1, max_size=8))
@settings(max_examples=60)
def test_no_picture_is_a_fault(kind: str, where: int, what: bytes) -> None:
    chunks, exif = PngImagePlugin.PngInfo(), Image.Exif()
    chunks.add_text("parameters", "x" * 50, zip=True)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + b"\0x" * 9
    buffer = io.BytesIO()
    more = {"pnginfo": chunks} if kind == "PNG" else {"exif": exif.tobytes()}
    Image.new("RGB", (8, 8)).save(buffer, kind, **more)
    data = buffer.getvalue()
    with suppress(InvalidRequest):
        texts(data[:where] + what + data[where + len(what) :])


def test_a_picture_without_words_says_nothing(mill: Deployment) -> None:
    image = base64.b64encode(picture()).decode()
    found = mill.client.post("/sdapi/v1/png-info", json={"image": image}).json()
    assert found == {"info": "", "items": {}, "parameters": {}}
