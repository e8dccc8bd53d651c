"""POST /v1/jobs: what is accepted, what is refused and by which name, and that nothing leaks."""

import json
from pathlib import Path

import pytest

from jobs.request import MAX_SEED
from tests.service.conftest import Deployment, pointers
from tests.waiting import wait_until

JSON = {"content-type": "application/json"}


def test_a_post_answers_202_with_the_job_and_where_it_is(mill: Deployment) -> None:
    body = {"model": "demo", "prompts": ["a", {"prompt": "b", "n": 2}], "metadata": {"k": [1]}}
    answer = mill.client.post("/v1/jobs", json=body)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["urls"]["self"]
    assert int(answer.headers["retry-after"]) >= 1
    assert (job["model"], job["state"], job["progress"]) == ("demo", "queued", 0)
    assert job["counts"]["total"] == job["counts"]["queued"] == 3
    assert [image["prompt"] for image in job["images"]] == ["a", "b", "b"]
    assert [image["index"] for image in job["images"]] == [0, 1, 2]
    assert job["metadata"] == {"k": [1]}
    assert mill.client.get(answer.headers["location"]).json()["images"] == job["images"]


def test_fields_come_from_the_prompt_then_the_job_then_the_catalog(mill: Deployment) -> None:
    own = {"prompt": "b", "width": 32, "steps": 3, "guidance_scale": 0, "negative_prompt": "x"}
    first, second, third = mill.submit(
        "a", own, {"prompt": "c", "steps": None}, height=64, steps=5, negative_prompt="y"
    )["images"]
    shape = ("width", "height", "steps", "guidance_scale", "negative_prompt")
    assert [first[name] for name in shape] == [128, 64, 5, 2.5, "y"]
    assert [second[name] for name in shape] == [32, 64, 3, 0, "x"]
    assert [third[name] for name in shape] == [128, 64, 5, 2.5, "y"]


def test_seeds_count_up_over_the_copies_and_wrap(mill: Deployment) -> None:
    job = mill.submit("a", {"prompt": "b", "seed": MAX_SEED}, "c", seed=7, n=2)
    assert [image["seed"] for image in job["images"]] == [7, 8, MAX_SEED, 0, 7, 8]


def test_a_seed_that_is_not_given_is_drawn_and_reported(mill: Deployment) -> None:
    seeds = [image["seed"] for image in mill.submit("a", "b", n=10)["images"]]
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_format_priority_and_reproducible_reach_the_queue(mill: Deployment) -> None:
    job = mill.submit("a", format="webp", priority=9, reproducible=False)
    assert job["priority"] == 9
    request = mill.store.image(job["id"], 0).request
    assert (request.format, request.reproducible) == ("webp", False)


def test_an_unknown_model_is_404_and_names_the_known_ones(mill: Deployment) -> None:
    answer = mill.client.post("/v1/jobs", json={"model": "nope", "prompts": ["a"]})
    assert answer.status_code == 404
    assert answer.json()["known"] == ["demo", "distilled", "idle"]
    assert pointers(answer) == ["/model"]


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
def test_a_bad_field_is_named_and_nothing_is_queued(
    mill: Deployment, fields: object, expected: list[str]
) -> None:
    before = mill.store.queue_depth()
    whole = isinstance(fields, list) or not fields or fields == {"model": "demo"}
    body = fields if whole else {"model": "demo", "prompts": ["a"], **fields}
    answer = mill.client.post("/v1/jobs", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert pointers(answer) == expected
    assert all(one["detail"] for one in answer.json()["errors"])
    assert mill.store.queue_depth() == before


def test_a_lone_surrogate_is_named(mill: Deployment) -> None:
    for text, expected in [
        ('"a", "\\ud800"', ["/prompts/1"]),
        ('{"prompt": "a", "negative_prompt": "\\udfff"}', ["/prompts/0/negative_prompt"]),
    ]:
        body = '{"model": "demo", "prompts": [' + text + "]}"
        answer = mill.client.post("/v1/jobs", content=body, headers=JSON)
        assert (answer.status_code, pointers(answer)) == (422, expected)


def test_a_lone_surrogate_in_metadata_is_refused(mill: Deployment) -> None:
    body = '{"model": "demo", "prompts": ["a"], "metadata": {"k": ["\\ud800"]}}'
    answer = mill.client.post("/v1/jobs", content=body, headers=JSON)
    assert (answer.status_code, pointers(answer)[0][:9]) == (422, "/metadata")


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
        b'\xef\xbb\xbf{"model": "demo", "prompts": ["a"]}',
    ],
)
def test_what_is_not_json_is_400(mill: Deployment, body: bytes) -> None:
    answer = mill.client.post("/v1/jobs", content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "urn:imagemill:problem:malformed-body"


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
def test_another_type_is_415(mill: Deployment, headers: dict[str, str]) -> None:
    body = json.dumps({"model": "demo", "prompts": ["a"]})
    answer = mill.client.post("/v1/jobs", content=body, headers=headers)
    assert answer.status_code == 415, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("kind", ["application/json; charset=UTF-8", "application/vnd.x+json"])
def test_json_by_another_name_is_read(mill: Deployment, kind: str) -> None:
    body = json.dumps({"model": "demo", "prompts": ["ä"]})
    answer = mill.client.post("/v1/jobs", content=body, headers={"content-type": kind})
    assert answer.status_code == 202


def test_a_large_body_is_413_by_its_length_alone(fresh: Deployment) -> None:
    answer = fresh.client.post("/v1/jobs", content=b" " * 20_001, headers=JSON)
    assert (answer.status_code, answer.json()["status"]) == (413, 413)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_large_body_of_unknown_length_is_413_while_it_streams(fresh: Deployment) -> None:
    taken = 0

    def endless():
        nonlocal taken
        while taken < 1_000:
            taken += 1
            yield b" " * 1_000

    answer = fresh.client.post("/v1/jobs", content=endless(), headers=JSON)
    assert answer.status_code == 413


def test_the_quota_is_429(fresh: Deployment) -> None:
    fresh.submit("a", n=20)
    answer = fresh.client.post("/v1/jobs", json={"model": "demo", "prompts": ["a"]})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["type"] == "urn:imagemill:problem:quota-exceeded"


def test_an_idempotency_key_gives_the_same_job(mill: Deployment) -> None:
    body = {"model": "demo", "prompts": ["a"], "metadata": {"b": 1, "a": 2}}
    headers = {"Idempotency-Key": "once"}
    first = mill.client.post("/v1/jobs", json=body, headers=headers)
    again = mill.client.post(
        "/v1/jobs",
        content=json.dumps(body, indent=3, sort_keys=True),
        headers={**headers, **JSON},
    )
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert first.json()["images"][0]["seed"] == again.json()["images"][0]["seed"]


def test_an_idempotency_key_with_another_body_is_422(mill: Deployment) -> None:
    headers = {"Idempotency-Key": "twice"}
    for prompt, expected in [("a", 202), ("b", 422)]:
        body = {"model": "demo", "prompts": [prompt]}
        answer = mill.client.post("/v1/jobs", json=body, headers=headers)
        assert answer.status_code == expected
    assert answer.json()["type"] == "urn:imagemill:problem:idempotency-mismatch"


@pytest.mark.parametrize("key", ["", "a b", "ä".encode(), "x" * 256])
def test_a_malformed_idempotency_key_is_400(mill: Deployment, key: str | bytes) -> None:
    body = {"model": "demo", "prompts": ["a"]}
    answer = mill.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
    assert answer.status_code == 400
    assert answer.json()["type"] == "urn:imagemill:problem:malformed-header"


def test_the_card_of_a_loaded_model_is_obeyed(fresh: Deployment) -> None:
    card = {"multiple": 32, "guidance": "embedded", "max_prompt_tokens": 3}
    fresh.store.publish_card("distilled", card)
    body = {"model": "distilled", "prompts": [{"prompt": "a", "width": 48}], "negative_prompt": "x"}
    answer = fresh.client.post("/v1/jobs", json=body)
    assert answer.status_code == 422
    assert pointers(answer) == ["/prompts/0/width"]
    job = fresh.submit("one two three four", "five", model="distilled", negative_prompt="")
    cut = "the model reads 3 tokens of a prompt and cuts the rest: /prompts/0"
    assert job["warnings"] == [cut]


def test_a_size_that_the_pipeline_rewrites_is_refused_with_those_it_makes(
    fresh: Deployment,
) -> None:
    fresh.store.publish_card("demo", {"multiple": 16, "sizes": [[128, 128], [64, 128]]})
    body = {"model": "demo", "prompts": [{"prompt": "a", "width": 64, "height": 64}]}
    answer = fresh.client.post("/v1/jobs", json=body)
    assert answer.status_code == 422
    assert pointers(answer) == ["/prompts/0/width"]
    assert "makes only 128x128, 64x128: its pipeline changes other sizes" in answer.text
    assert fresh.submit("a")["warnings"] == []


def test_prompts_are_counted_by_the_tokenizer_that_a_worker_left(fresh: Deployment) -> None:
    form = {"before": "", "after": "", "lowered": False, "dropped": 0}
    fresh.store.publish_card("demo", {"max_prompt_tokens": 8, "prompt": form})
    path = fresh.settings.tokenizer_file("demo")
    path.parent.mkdir()
    source = Path(__file__).parents[2] / "demo" / "model" / "tokenizer_2" / "tokenizer.json"
    path.write_bytes(source.read_bytes())
    fits, unknown_words = "a red star on a blue", "unforeseeable words here"
    assert fresh.submit(fits)["warnings"] == []
    [warning] = fresh.submit(fits, unknown_words, negative_prompt="")["warnings"]
    assert warning.endswith(": /prompts/1")
    fresh.store.publish_card(
        "demo", {"max_prompt_tokens": 8, "prompt": form | {"removed": "[IMG]"}}
    )
    tagged = "[IMG]a red star[IMG] on a blue"
    wait_until(lambda: fresh.submit(tagged)["warnings"] == [])  # cards are cached for a moment
    fresh.store.publish_card("demo", {"max_prompt_tokens": 8, "prompt": form})
    wait_until(lambda: fresh.submit(tagged)["warnings"] != [])
    path.write_text("{")
    assert fresh.submit(unknown_words)["warnings"] == []


def test_guidance_without_effect_is_a_warning(fresh: Deployment) -> None:
    fresh.store.publish_card("distilled", {"guidance": "none"})
    assert fresh.submit(model="distilled")["warnings"] == []
    assert "no effect" in fresh.submit(model="distilled", guidance_scale=3)["warnings"][0]
    fresh.store.publish_card("distilled", {"guidance": "fixed"})
    assert "no effect" in fresh.submit(model="distilled", guidance_scale=3)["warnings"][0]


@pytest.mark.parametrize("guidance", ["embedded", "none"])
def test_a_negative_prompt_that_no_guidance_reads_is_a_warning(
    fresh: Deployment, guidance: str
) -> None:
    fresh.store.publish_card("distilled", {"guidance": guidance})
    [warning] = fresh.submit(model="distilled", negative_prompt="blur")["warnings"]
    assert warning == "negative_prompt has no effect: the model has no classifier-free guidance"
    assert fresh.submit(model="distilled", negative_prompt="")["warnings"] == []


def test_a_negative_prompt_while_guidance_is_off_is_a_warning(fresh: Deployment) -> None:
    card = {"guidance": "classifier-free", "guides_above": 1.0}
    fresh.store.publish_card("idle", card)
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
    fresh.store.publish_card("idle", {**card, "guides_above": 0.0})
    blurred = {"model": "idle", "negative_prompt": "blur"}
    wait_until(lambda: fresh.submit("a", **blurred)["warnings"] == [])


def test_a_webhook_is_kept(mill: Deployment) -> None:
    hook = {"url": "https://example.org/hook", "events": ["job.failed"]}
    assert mill.submit("a", webhook=hook)["state"] == "queued"
