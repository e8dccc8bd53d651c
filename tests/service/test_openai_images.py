"""OpenAI's Images API with OpenAI's own client, against a running service."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from jobs.reports import Measured, PromptForm
from jobs.runtime.embedded_queue import EmbeddedServer
from tests import web
from tests.service.conftest import Deployment, card, deployed, picture, working
from tests.service.live import leaving, listening
from tests.waiting import PATIENCE, wait_until


@pytest.fixture(scope="module")
def live(
    server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, openai.OpenAI]]:
    """A service that listens on a port, and OpenAI's client for it."""
    folder = tmp_path_factory.mktemp("openai")
    with (
        deployed(server.url, folder, start=False, sync_seconds=PATIENCE) as service,
        listening(service.client.app) as address,
        web.Client(base_url=address, timeout=PATIENCE) as client,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=PATIENCE) as theirs,
    ):
        service.client = client
        yield service, theirs


def test_image_is_returned_as_bytes_and_url(live: tuple) -> None:
    deployment, client = live
    with working(deployment) as leases:
        response = client.images.generate(model="demo", prompt="a red circle", size="64x32")
    (request,) = [lease.request for lease in leases]
    assert (request.prompt, request.width, request.height) == ("a red circle", 64, 32)
    (image,) = response.data
    assert base64.b64decode(image.b64_json) == picture(64, 32)
    assert image.url.startswith("http://127.0.0.1:")
    assert web.get(image.url).content == picture(64, 32)
    assert (response.size, response.output_format) == ("64x32", "png")
    assert image.seed == request.seed


@pytest.mark.parametrize(("form", "other"), [("b64_json", "url"), ("url", "b64_json")])
def test_single_response_format(live: tuple, form: str, other: str) -> None:
    deployment, client = live
    with working(deployment):
        response = client.images.generate(model="demo", prompt="a", n=2, response_format=form)
    assert len(response.data) == 2
    assert all(getattr(image, form) and not getattr(image, other) for image in response.data)


def test_our_fields_are_the_extra_body(live: tuple) -> None:
    deployment, client = live
    extra = {
        "seed": 7,
        "steps": 3,
        "guidance_scale": 1.5,
        "negative_prompt": "blur",
        "reproducible": False,
        "priority": 8,
    }
    with working(deployment) as leases:
        client.images.generate(prompt="a", n=2, output_format="webp", extra_body=extra)
    requests = [lease.request for lease in leases]
    assert [request.seed for request in requests] == [7, 8]
    assert {
        (r.model, r.steps, r.guidance_scale, r.negative_prompt, r.format, r.reproducible)
        for r in requests
    } == {("demo", 3, 1.5, "blur", "webp", False)}


def test_stream_of_previews_and_images(live: tuple) -> None:
    deployment, client = live
    drawn = picture(16, 16, 7)
    events = client.images.generate(prompt="a", stream=True, partial_images=1, size="32x32")
    (lease,) = wait_until(deployment.worker.claim)
    deployment.images.write(lease.job_id, 0, "preview", drawn, ".jpg")
    deployment.store.beat("hand", {(lease.key, lease.token): 2}, 60)
    first = next(iter(events))
    assert (first.type, first.partial_image_index) == ("image_generation.partial_image", 0)
    assert base64.b64decode(first.b64_json) == drawn
    data = deployment.worker.finish(lease)
    (last,) = list(events)
    assert (last.type, last.size) == ("image_generation.completed", "32x32")
    assert base64.b64decode(last.b64_json) == data
    assert last.usage is None  # no worker has published how to count


def test_usage_needs_a_published_card(live: tuple) -> None:
    deployment, client = live
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = WhitespaceSplit()
    path = deployment.settings.tokenizer_file("distilled")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words.to_str())
    measured = Measured(costs=((64, 0.5),), pinned=1, largest=1, image_tokens_per_pixel=1 / 64)
    counted = replace(card(prompt=PromptForm()), measured=measured)
    deployment.store.publish_card("distilled", counted)
    with working(deployment, model="distilled"):
        wish = {"model": "distilled", "prompt": "a red circle", "size": "64x32"}
        response = client.images.generate(**wish, n=2, extra_body={"negative_prompt": "so blue"})
        (event,) = client.images.generate(**wish, stream=True)
    assert response.usage.model_dump(exclude={"output_tokens_details"}) == {
        "input_tokens": 5,
        "output_tokens": 2 * 32,
        "total_tokens": 5 + 64,
        "input_tokens_details": {"text_tokens": 5, "image_tokens": 0},
    }
    assert (event.usage.input_tokens, event.usage.output_tokens) == (3, 32)
    with working(deployment):
        assert client.images.generate(prompt="a", model="demo").usage is None


def test_every_image_is_streamed_once(live: tuple) -> None:
    deployment, client = live
    with working(deployment):
        events = list(client.images.generate(prompt="a", n=3, stream=True))
    assert sorted(event.index for event in events) == [0, 1, 2]


def test_failure_ends_the_stream_with_an_error(live: tuple) -> None:
    deployment, client = live
    with (
        working(deployment, deployment.worker.fail),
        pytest.raises(openai.APIError, match="it would not"),
    ):
        list(client.images.generate(prompt="a", stream=True))


def test_failure_is_not_retried_by_the_client(live: tuple) -> None:
    deployment, client = live
    with (
        working(deployment, deployment.worker.fail) as leases,
        pytest.raises(openai.InternalServerError, match="it would not") as refusal,
    ):
        client.images.generate(prompt="a")
    assert (refusal.value.status_code, refusal.value.code) == (502, "images_failed")
    assert len(leases) == 1


REFUSED = [
    ({"size": "100x64"}, "size"),
    ({"size": "1024x1024"}, "size"),
    ({"size": "99999x99999"}, "size"),
    ({"size": "big"}, "size"),
    ({"n": 11}, "n"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "  "}, "prompt"),
    ({"quality": "best"}, "quality"),
    ({"style": "loud"}, "style"),
    ({"background": "transparent"}, "background"),
    ({"extra_body": {"steps": 101}}, "steps"),
    ({"extra_body": {"colour": "red"}}, "colour"),
    ({"partial_images": 4, "stream": True}, "partial_images"),
    ({"extra_body": {"num_inference_steps": 101}}, "num_inference_steps"),
    ({"extra_body": {"num_inference_steps": 4, "steps": 5}}, ""),
    ({"extra_body": {"true_cfg_scale": 4}}, "true_cfg_scale"),
    ({"extra_body": {"max_sequence_length": 99}}, "max_sequence_length"),
    ({"extra_body": {"generator_device": "cuda"}}, "generator_device"),
    ({"extra_body": {"flow_shift": 3}}, "flow_shift"),
    ({"extra_body": {"lora": [{"name": "x"}]}}, "lora"),
    ({"extra_body": {"enable_upscaling": True}}, "enable_upscaling"),
]


@pytest.mark.parametrize(("fields", "name"), REFUSED)
def test_invalid_field_in_openai_envelope(live: tuple, fields: dict, name: str) -> None:
    deployment, client = live
    before = deployment.store.queue_depth()
    with pytest.raises(openai.BadRequestError) as refusal:
        client.images.generate(**{"prompt": "a", **fields})
    assert (refusal.value.param, refusal.value.type) == (name, "invalid_request_error")
    assert deployment.store.queue_depth() == before


MESSAGES = [
    ({"extra_body": {"colour": "red"}}, "unknown_parameter", r"Unknown parameter: 'colour'\."),
    ({"quality": "best"}, "invalid_value", r"'quality'.*'hd'.*not \"best\""),
    ({"background": "transparent"}, "invalid_value", r"'background'.*'opaque', not \"trans"),
    ({"size": "1024x1024"}, "invalid_value", r"'size'.*1024x1024.*largest square is 256x256"),
    ({"n": 11}, "invalid_value", r"'n'.*10, not 11"),
]


@pytest.mark.parametrize(("fields", "code", "message"), MESSAGES)
def test_message_names_field_value_and_what_works(
    live: tuple, fields: dict, code: str, message: str
) -> None:
    _, client = live
    with pytest.raises(openai.BadRequestError, match=message) as refusal:
        client.images.generate(**{"prompt": "a", **fields})
    assert refusal.value.code == code


def test_fields_without_effect_are_named(live: tuple) -> None:
    deployment, client = live
    sent = {"quality": "hd", "style": "vivid", "moderation": "low", "output_compression": 80}
    with working(deployment):
        response = client.images.generate(prompt="a", **sent)
        null = dict.fromkeys((*sent, "background", "size", "n", "user", "reproducible", "lora"))
        plain = web.post(
            f"{client.base_url}images/generations", json={"prompt": "a", **null}
        ).json()
    assert response.warnings == [
        "quality has no effect",
        "style has no effect",
        "output_compression has no effect",
    ]
    assert plain["warnings"] == []


def test_fields_of_other_engines(live: tuple) -> None:
    deployment, client = live
    extra = {
        "num_inference_steps": 3,
        "guidance_scale": 2,
        "true_cfg_scale": 1,
        "generator_device": "cpu",
        "enable_upscaling": False,
        "extra_body": {"seed": 9},
    }
    with working(deployment) as leases:
        client.images.generate(prompt="a", extra_body=extra)
    (request,) = [lease.request for lease in leases]
    assert (request.steps, request.guidance_scale, request.seed) == (3, 2, 9)


def test_true_cfg_scale_is_the_guidance_of_a_guided_model(live: tuple) -> None:
    deployment, client = live
    guided = card(guidance="classifier-free", max_prompt_tokens=77)
    deployment.store.publish_card("idle", guided)
    extra = {"true_cfg_scale": 4, "guidance_scale": 1, "max_sequence_length": 77}
    with working(deployment, model="idle") as leases:
        client.images.generate(model="idle", prompt="a", extra_body=extra)
    assert [lease.request.guidance_scale for lease in leases] == [4]


def test_health_where_other_servers_have_it(live: tuple) -> None:
    deployment, _ = live
    for path in ("/health", "/v1/health"):
        assert (
            deployment.client.get(path).status_code == deployment.client.get("/readyz").status_code
        )


def test_unknown_paths_have_a_message_for_openai_clients(live: tuple) -> None:
    _, client = live
    with pytest.raises(openai.NotFoundError, match="unknown model 'nope'"):
        client.models.retrieve("nope")
    with pytest.raises(openai.NotFoundError, match="not found: /v1/chat/completions"):
        client.chat.completions.create(model="demo", messages=[])


def test_unknown_model_is_openai_not_found(live: tuple) -> None:
    _, client = live
    with pytest.raises(openai.NotFoundError, match="known models: demo") as refusal:
        client.images.generate(prompt="a", model="dall-e-3")
    assert (refusal.value.param, refusal.value.code) == ("model", "unknown_model")


def test_other_failures_use_the_openai_envelope(live: tuple) -> None:
    deployment, _ = live
    for response, expected in [
        (deployment.client.get("/v1/images/generations"), 405),
        (deployment.client.post("/v1/images/generations", content=b"{"), 415),
        (deployment.client.post("/v1/images/nope"), 404),
    ]:
        assert response.status_code == expected
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_disconnect_cancels_the_job(live: tuple) -> None:
    deployment, _ = live
    for stream in (False, True):
        body = {"prompt": f"left {stream}", "stream": stream}
        with leaving(str(deployment.client.base_url), "/v1/images/generations", body):
            wait_until(deployment.store.queue_depth)
        wait_until(lambda: not deployment.store.queue_depth())
    states = [job.state for job in deployment.store.jobs("local", limit=2)[0]]
    assert states == ["cancelled", "cancelled"]


def test_caller_with_idempotency_key_can_retry(live: tuple) -> None:
    deployment, client = live
    key = {"Idempotency-Key": "images-1"}
    again = {"prompt": "a", "extra_headers": key}
    with leaving(str(deployment.client.base_url), "/v1/images/generations", {"prompt": "a"}, **key):
        wait_until(deployment.store.queue_depth)
    with working(deployment) as leases:
        response = client.images.generate(**again)
    assert len(leases) == 1 and response.data[0].b64_json


def test_cancelled_job_is_a_conflict(live: tuple) -> None:
    deployment, client = live
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.images.generate, prompt="a")
        (lease,) = wait_until(deployment.worker.claim)
        deployment.store.cancel(lease.job_id, None)
        with pytest.raises(openai.ConflictError, match="cancelled"):
            waiting.result()


def test_model_list_works_with_openai_client(live: tuple) -> None:
    _, client = live
    assert [model.id for model in client.models.list()] == ["demo", "distilled", "idle"]
    assert client.models.retrieve("demo").owned_by == "imagemill"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
