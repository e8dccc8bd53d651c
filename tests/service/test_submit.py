"""POST /v1/jobs: accepted and refused bodies, limits, warnings."""

import json
from pathlib import Path

import pytest

from jobs.reports import PromptForm
from jobs.request import MAX_SEED
from service.read import worker_cache
from tests.service.conftest import Deployment, card, pointers

JSON = {"content-type": "application/json"}


def test_post_is_202_with_job_and_location(deployment: Deployment) -> None:
    body = {"model": "demo", "prompts": ["a", {"prompt": "b", "n": 2}], "metadata": {"k": [1]}}
    response = deployment.client.post("/v1/jobs", json=body)
    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/jobs/{job['id']}" == job["urls"]["self"]
    assert int(response.headers["retry-after"]) >= 1
    assert (job["model"], job["state"], job["progress"]) == ("demo", "queued", 0)
    assert job["counts"]["total"] == job["counts"]["queued"] == 3
    assert [image["prompt"] for image in job["images"]] == ["a", "b", "b"]
    assert [image["index"] for image in job["images"]] == [0, 1, 2]
    assert job["metadata"] == {"k": [1]}
    assert deployment.client.get(response.headers["location"]).json()["images"] == job["images"]


def test_field_precedence_is_prompt_job_catalog(deployment: Deployment) -> None:
    own = {"prompt": "b", "width": 32, "steps": 3, "guidance_scale": 0, "negative_prompt": "x"}
    first, second, third = deployment.submit(
        "a", own, {"prompt": "c", "steps": None}, height=64, steps=5, negative_prompt="y"
    )["images"]
    shape = ("width", "height", "steps", "guidance_scale", "negative_prompt")
    assert [first[name] for name in shape] == [128, 64, 5, 2.5, "y"]
    assert [second[name] for name in shape] == [32, 64, 3, 0, "x"]
    assert [third[name] for name in shape] == [128, 64, 5, 2.5, "y"]


def test_seeds_increment_over_copies_and_wrap(deployment: Deployment) -> None:
    job = deployment.submit("a", {"prompt": "b", "seed": MAX_SEED}, "c", seed=7, n=2)
    assert [image["seed"] for image in job["images"]] == [7, 8, MAX_SEED, 0, 7, 8]


def test_missing_seed_is_random_and_reported(deployment: Deployment) -> None:
    seeds = [image["seed"] for image in deployment.submit("a", "b", n=10)["images"]]
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_format_priority_and_reproducible_reach_the_queue(deployment: Deployment) -> None:
    job = deployment.submit("a", format="webp", priority=9, reproducible=False)
    assert job["priority"] == 9
    request = deployment.store.image(job["id"], 0).request
    assert (request.format, request.reproducible) == ("webp", False)


def test_unknown_model_is_404_with_known_models(deployment: Deployment) -> None:
    response = deployment.client.post("/v1/jobs", json={"model": "nope", "prompts": ["a"]})
    assert response.status_code == 404
    assert response.json()["known"] == ["demo", "distilled", "idle"]
    assert pointers(response) == ["/model"]


REFUSED = [
    ({}, ["/model", "/prompts"]),
    ([], [""]),
    ({"model": "demo"}, ["/prompts"]),
    ({"prompts": []}, ["/prompts"]),
    ({"prompts": "a"}, ["/prompts"]),
    ({"prompts": [""]}, ["/prompts/0"]),
    ({"prompts": ["  "]}, ["/prompts/0"]),
    ({"prompts": [7]}, ["/prompts/0"]),
    ({"prompts": [None]}, ["/prompts/0"]),
    ({"prompts": ["a\0b"]}, ["/prompts/0"]),
    ({"prompts": ["a" * 10_001]}, ["/prompts/0"]),
    ({"prompts": [{}]}, ["/prompts/0/prompt"]),
    ({"prompts": [{"prompt": " "}]}, ["/prompts/0/prompt"]),
    ({"prompts": [" \n"]}, ["/prompts/0"]),
    ({"prompts": [{"prompt": "a", "colour": 1}]}, ["/prompts/0/colour"]),
    ({"prompts": [{"prompt": "a", "a/b~c": 1}]}, ["/prompts/0/a~1b~0c"]),
    ({"prompts": ["a", "b", "c", {"prompt": "d", "width": 100}]}, ["/prompts/3/width"]),
    ({"prompts": [{"prompt": "a", "width": 512, "height": 512}]}, ["/prompts/0/width"]),
    ({"prompts": [{"prompt": "a", "steps": 0}]}, ["/prompts/0/steps"]),
    ({"prompts": [{"prompt": "a", "steps": 101}]}, ["/prompts/0/steps"]),
    ({"prompts": [{"prompt": "a", "n": 0}]}, ["/prompts/0/n"]),
    ({"prompts": [{"prompt": "a", "seed": -1}]}, ["/prompts/0/seed"]),
    ({"prompts": [{"prompt": "a", "seed": 2**53}]}, ["/prompts/0/seed"]),
    ({"prompts": [{"prompt": "a", "negative_prompt": 1}]}, ["/prompts/0/negative_prompt"]),
    ({"prompts": ["a", {"prompt": "b", "seed": 1.5}, 7]}, ["/prompts/1/seed", "/prompts/2"]),
    ({"model": 7}, ["/model"]),
    ({"width": 100}, ["/width"]),
    ({"width": 128.0}, ["/width"]),
    ({"width": "128"}, ["/width"]),
    ({"width": True}, ["/width"]),
    ({"width": 10**4000}, ["/width"]),
    ({"height": -16}, ["/height"]),
    ({"steps": 101}, ["/steps"]),
    ({"steps": "8"}, ["/steps"]),
    ({"guidance_scale": -1}, ["/guidance_scale"]),
    ({"guidance_scale": 31}, ["/guidance_scale"]),
    ({"guidance_scale": "2"}, ["/guidance_scale"]),
    ({"guidance_scale": True}, ["/guidance_scale"]),
    ({"n": 51}, ["/prompts"]),
    ({"n": 10**9}, ["/n"]),
    ({"priority": 10}, ["/priority"]),
    ({"priority": -1}, ["/priority"]),
    ({"priority": None}, ["/priority"]),
    ({"priority": "5"}, ["/priority"]),
    ({"format": "gif"}, ["/format"]),
    ({"format": None}, ["/format"]),
    ({"reproducible": "yes"}, ["/reproducible"]),
    ({"reproducible": 1}, ["/reproducible"]),
    ({"metadata": []}, ["/metadata"]),
    ({"metadata": {"k": "x" * 20_000}}, ["/metadata"]),
    ({"webhook": "http://x"}, ["/webhook"]),
    ({"webhook": {}}, ["/webhook/url"]),
    ({"webhook": {"url": "ftp://x.org/"}}, ["/webhook/url"]),
    ({"webhook": {"url": "http://"}}, ["/webhook/url"]),
    ({"webhook": {"url": "http://[::1"}}, ["/webhook/url"]),
    ({"webhook": {"url": "http://x.org:99999/"}}, ["/webhook/url"]),
    ({"webhook": {"url": "http://u:p@x.org/"}}, ["/webhook/url"]),
    ({"webhook": {"url": "http://x.org/a b"}}, ["/webhook/url"]),
    ({"webhook": {"url": "http://x.org/", "events": []}}, ["/webhook/events"]),
    ({"webhook": {"url": "http://x.org/", "events": ["no"]}}, ["/webhook/events/0"]),
    ({"webhook": {"url": "http://x.org/", "extra": 1}}, ["/webhook/extra"]),
    ({"promts": ["a"]}, ["/promts"]),
]


@pytest.mark.parametrize(("fields", "expected"), REFUSED)
def test_invalid_field_is_reported_and_nothing_queued(
    deployment: Deployment, fields: object, expected: list[str]
) -> None:
    before = deployment.store.queue_depth()
    whole = isinstance(fields, list) or not fields or fields == {"model": "demo"}
    body = fields if whole else {"model": "demo", "prompts": ["a"], **fields}
    response = deployment.client.post("/v1/jobs", json=body)
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert pointers(response) == expected
    assert all(problem["detail"] for problem in response.json()["errors"])
    assert deployment.store.queue_depth() == before


def test_lone_surrogate_is_reported(deployment: Deployment) -> None:
    for text, expected in [
        ('"a", "\\ud800"', ["/prompts/1"]),
        ('{"prompt": "a", "negative_prompt": "\\udfff"}', ["/prompts/0/negative_prompt"]),
    ]:
        body = '{"model": "demo", "prompts": [' + text + "]}"
        response = deployment.client.post("/v1/jobs", content=body, headers=JSON)
        assert (response.status_code, pointers(response)) == (422, expected)


def test_lone_surrogate_in_metadata_is_refused(deployment: Deployment) -> None:
    body = '{"model": "demo", "prompts": ["a"], "metadata": {"k": ["\\ud800"]}}'
    response = deployment.client.post("/v1/jobs", content=body, headers=JSON)
    assert (response.status_code, pointers(response)[0][:9]) == (422, "/metadata")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nul",
        b'{"model": "demo", "prompts": ["\xff"]}',
        b'{"model": "demo", "prompts": ["a"], "guidance_scale": NaN}',
        b'{"model": "demo", "prompts": ["a"], "guidance_scale": Infinity}',
        b'{"model": "demo", "prompts": ["a"], "guidance_scale": 1e999}',
        b'{"model": "demo", "prompts": ["a"], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "demo", "model": "demo", "prompts": ["a"]}',
        b'{"model": "demo", "prompts": [{"prompt": "a", "n": 1, "n": 2}]}',
        b'{"\\ud800": 1}',
        b"[" * 100_000,
        b'{"metadata": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'\xef\xbb\xbf\xef\xbb\xbf{"model": "demo", "prompts": ["a"]}',
    ],
)
def test_invalid_json_is_400(deployment: Deployment, body: bytes) -> None:
    response = deployment.client.post("/v1/jobs", content=body, headers=JSON)
    assert response.status_code == 400, response.text
    assert response.json()["type"] == "urn:imagemill:problem:malformed-body"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_unsupported_type_is_415(deployment: Deployment, headers: dict[str, str]) -> None:
    body = json.dumps({"model": "demo", "prompts": ["a"]})
    response = deployment.client.post("/v1/jobs", content=body, headers=headers)
    assert response.status_code == 415, response.text
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("kind", ["application/json; charset=UTF-8", "application/vnd.x+json"])
def test_json_suffix_types_are_accepted(deployment: Deployment, kind: str) -> None:
    body = json.dumps({"model": "demo", "prompts": ["ä"]})
    response = deployment.client.post("/v1/jobs", content=body, headers={"content-type": kind})
    assert response.status_code == 202


def test_large_content_length_is_413(fresh: Deployment) -> None:
    response = fresh.client.post("/v1/jobs", content=b" " * 20_001, headers=JSON)
    assert (response.status_code, response.json()["status"]) == (413, 413)
    assert response.headers["content-type"] == "application/problem+json"


def test_large_streamed_body_is_413(fresh: Deployment) -> None:
    sent = 0

    def endless():
        nonlocal sent
        while sent < 1_000:
            sent += 1
            yield b" " * 1_000

    response = fresh.client.post("/v1/jobs", content=endless(), headers=JSON)
    assert response.status_code == 413


def test_exceeded_quota_is_429(fresh: Deployment) -> None:
    fresh.submit("a", n=20)
    response = fresh.client.post("/v1/jobs", json={"model": "demo", "prompts": ["a"]})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["type"] == "urn:imagemill:problem:quota-exceeded"


def test_idempotency_key_returns_the_same_job(deployment: Deployment) -> None:
    body = {"model": "demo", "prompts": ["a"], "metadata": {"b": 1, "a": 2}}
    headers = {"Idempotency-Key": "once"}
    first = deployment.client.post("/v1/jobs", json=body, headers=headers)
    again = deployment.client.post(
        "/v1/jobs",
        content=json.dumps(body, indent=3, sort_keys=True),
        headers={**headers, **JSON},
    )
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert first.json()["images"][0]["seed"] == again.json()["images"][0]["seed"]


def test_idempotency_key_with_another_body_is_422(deployment: Deployment) -> None:
    headers = {"Idempotency-Key": "twice"}
    for prompt, expected in [("a", 202), ("b", 422)]:
        body = {"model": "demo", "prompts": [prompt]}
        response = deployment.client.post("/v1/jobs", json=body, headers=headers)
        assert response.status_code == expected
    assert response.json()["type"] == "urn:imagemill:problem:idempotency-mismatch"


@pytest.mark.parametrize("key", ["", "a b", "ä".encode(), "x" * 256])
def test_malformed_idempotency_key_is_400(deployment: Deployment, key: str | bytes) -> None:
    body = {"model": "demo", "prompts": ["a"]}
    response = deployment.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
    assert response.status_code == 400
    assert response.json()["type"] == "urn:imagemill:problem:malformed-header"


def test_card_of_a_loaded_model_is_enforced(fresh: Deployment) -> None:
    fresh.store.publish_card("distilled", card(multiple=32, max_prompt_tokens=3))
    body = {"model": "distilled", "prompts": [{"prompt": "a", "width": 48}], "negative_prompt": "x"}
    response = fresh.client.post("/v1/jobs", json=body)
    assert response.status_code == 422
    assert pointers(response) == ["/prompts/0/width"]
    job = fresh.submit("one two three four", "five", model="distilled", negative_prompt="")
    cut = "the model reads 3 tokens of a prompt and cuts the rest: /prompts/0"
    assert job["warnings"] == [cut]


def test_unsupported_size_is_refused_with_supported_ones(
    fresh: Deployment,
) -> None:
    fresh.store.publish_card("demo", card(sizes=((128, 128), (64, 128))))
    body = {"model": "demo", "prompts": [{"prompt": "a", "width": 64, "height": 64}]}
    response = fresh.client.post("/v1/jobs", json=body)
    assert response.status_code == 422
    assert pointers(response) == ["/prompts/0/width"]
    assert "only supports 128x128, 64x128: its pipeline changes other sizes" in response.text
    assert fresh.submit("a")["warnings"] == []


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's card is read again for each request."""
    monkeypatch.setattr(worker_cache, "CARD_SECONDS", 0.0)


@pytest.mark.usefixtures("uncached")
def test_prompts_are_counted_by_the_published_tokenizer(fresh: Deployment) -> None:
    plain = card(max_prompt_tokens=8, prompt=PromptForm())
    fresh.store.publish_card("demo", plain)
    path = fresh.settings.tokenizer_file("demo")
    path.parent.mkdir()
    source = Path(__file__).parents[2] / "demo" / "model" / "tokenizer_2" / "tokenizer.json"
    path.write_bytes(source.read_bytes())
    fits, unknown_words = "a red star on a blue", "unforeseeable words here"
    assert fresh.submit(fits)["warnings"] == []
    [warning] = fresh.submit(fits, unknown_words, negative_prompt="")["warnings"]
    assert warning.endswith(": /prompts/1")
    cleaned = card(max_prompt_tokens=8, prompt=PromptForm(removed="[IMG]"))
    fresh.store.publish_card("demo", cleaned)
    tagged = "[IMG]a red star[IMG] on a blue"
    assert fresh.submit(tagged)["warnings"] == []
    fresh.store.publish_card("demo", plain)
    assert fresh.submit(tagged)["warnings"] != []
    path.write_text("{")
    assert fresh.submit(unknown_words)["warnings"] == []


def test_guidance_without_effect_warns(fresh: Deployment) -> None:
    fresh.store.publish_card("distilled", card(guidance="none"))
    assert fresh.submit(model="distilled")["warnings"] == []
    assert "no effect" in fresh.submit(model="distilled", guidance_scale=3)["warnings"][0]
    fresh.store.publish_card("distilled", card(guidance="fixed"))
    assert "no effect" in fresh.submit(model="distilled", guidance_scale=3)["warnings"][0]


@pytest.mark.parametrize("guidance", ["embedded", "none"])
def test_negative_prompt_without_guidance_support_warns(fresh: Deployment, guidance: str) -> None:
    fresh.store.publish_card("distilled", card(guidance=guidance))
    [warning] = fresh.submit(model="distilled", negative_prompt="blur")["warnings"]
    assert warning == "negative_prompt has no effect: the model has no classifier-free guidance"
    assert fresh.submit(model="distilled", negative_prompt="")["warnings"] == []


@pytest.mark.usefixtures("uncached")
def test_negative_prompt_with_guidance_off_warns(fresh: Deployment) -> None:
    fresh.store.publish_card("idle", card(guidance="classifier-free"))
    prompts = [{"prompt": "a"}, {"prompt": "b", "guidance_scale": 1.5}, {"prompt": "c"}]
    [warning] = fresh.submit(*prompts, model="idle", negative_prompt="blur")["warnings"]
    assert warning == (
        "negative_prompt has no effect without a guidance_scale above 1: /prompts/0, /prompts/2"
    )
    own = [{"prompt": "a", "negative_prompt": "x"}, {"prompt": "b"}]
    [warning] = fresh.submit(*own, model="idle")["warnings"]
    assert warning.endswith("above 1: /prompts/0")
    guided = {"model": "idle", "negative_prompt": "blur", "guidance_scale": 1.5}
    assert fresh.submit("a", **guided)["warnings"] == []
    fresh.store.publish_card("idle", card(guidance="classifier-free", guides_above=0.0))
    blurred = {"model": "idle", "negative_prompt": "blur"}
    assert fresh.submit("a", **blurred)["warnings"] == []


def test_webhook_is_stored(deployment: Deployment) -> None:
    hook = {"url": "https://example.org/hook", "events": ["job.failed"]}
    assert deployment.submit("a", webhook=hook)["state"] == "queued"


def test_byte_order_mark_is_ignored(deployment: Deployment) -> None:
    body = b'\xef\xbb\xbf{"model": "demo", "prompts": ["a"]}'
    assert deployment.client.post("/v1/jobs", content=body, headers=JSON).status_code == 202
