"""Expansion of a POST into image requests, as a pure function; bodies made by Hypothesis."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import InvalidRequest
from jobs.request import MAX_SEED
from service.submit import submission
from service.submit.schemas import MAX_TEXT_BYTES, SubmitJob
from service.submit.submission import image_requests
from tests.service.conftest import CATALOG, Deployment, pointers

DEMO = CATALOG.get("demo")
LARGE = replace(DEMO, limits=replace(DEMO.limits, max_prompts=10_000))
own = st.fixed_dictionaries(
    {"prompt": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)},
    optional={
        "seed": st.none() | st.integers(0, MAX_SEED),
        "n": st.none() | st.integers(1, 4),
        "width": st.sampled_from([None, 16, 64, 256, 8192]),
        "steps": st.none() | st.integers(1, 150),
    },
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
fields = st.sampled_from([*SubmitJob.model_fields, "odd", "a/b"])


@given(prompts=st.lists(own, min_size=1, max_size=8), seed=st.none() | st.integers(0, MAX_SEED))
@settings(max_examples=60)
def test_every_copy_is_there_or_every_bad_field_is_named(
    prompts: list[dict], seed: int | None
) -> None:
    job = SubmitJob.model_validate({"model": "demo", "prompts": prompts, "seed": seed})
    bad = {
        f"/prompts/{position}/{name}"
        for position, entry in enumerate(prompts)
        for name, wrong in [
            ("prompt", not entry["prompt"].strip()),
            ("width", (entry.get("width") or 128) * 128 > 65536),
            ("steps", (entry.get("steps") or 8) > 100),
        ]
        if wrong
    }
    if bad:
        with pytest.raises(InvalidRequest) as refusal:
            image_requests(job, DEMO, None)
        assert {problem.pointer for problem in refusal.value.problems} == bad
        return
    made = image_requests(job, DEMO, None, draw=iter(range(1000)).__next__)
    assert len(made) == sum(entry.get("n") or 1 for entry in prompts)
    for request in made:
        assert 0 <= request.seed <= MAX_SEED and request.pixels <= 65536


@given(body=st.dictionaries(fields, json_values, max_size=5) | json_values)
@settings(max_examples=80)
def test_no_body_is_a_fault(mill: Deployment, body: object) -> None:
    if isinstance(body, dict):
        body = {"model": "demo", "prompts": ["a"], **body}
    answer = mill.client.post(
        "/v1/jobs", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (202, 400, 404, 422)


@given(body=st.binary(max_size=200))
@settings(max_examples=50)
def test_no_bytes_are_a_fault(mill: Deployment, body: bytes) -> None:
    answer = mill.client.post(
        "/v1/jobs", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)


def test_a_bad_default_is_named_once() -> None:
    job = SubmitJob.model_validate({"model": "demo", "prompts": ["a"] * 49, "steps": 101})
    with pytest.raises(InvalidRequest) as refusal:
        image_requests(job, DEMO, None)
    assert [problem.pointer for problem in refusal.value.problems] == ["/steps"]


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"prompts": ["\N{ARTIST PALETTE}" * 10_000], "n": 10_000}, 400_000_000),
        ({"prompts": [{"prompt": "ä", "n": 2000}], "negative_prompt": "b" * 9999}, 20_002_000),
        ({"prompts": ["\x01" * 1000], "n": 3000}, 18_000_000),
        ({"prompts": ["a", {"prompt": "a", "n": 9000, "negative_prompt": "b" * 2000}]}, 18_009_001),
    ],
)
def test_the_texts_of_all_copies_have_a_limit(fields: dict, size: int) -> None:
    job = SubmitJob.model_validate({"model": "demo", **fields})
    with pytest.raises(InvalidRequest) as refusal:
        image_requests(job, LARGE, None, draw=lambda: pytest.fail("requests were made"))
    (problem,) = refusal.value.problems
    assert problem.pointer == "/prompts"
    assert str(size) in problem.detail and str(MAX_TEXT_BYTES) in problem.detail


def test_ten_thousand_long_prompts_are_one_job() -> None:
    prompts = [f"{number:05}" + "a" * 995 for number in range(10_000)]
    job = SubmitJob.model_validate({"model": "demo", "prompts": prompts, "negative_prompt": "b"})
    assert len(image_requests(job, LARGE, None)) == 10_000


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/jobs", {"model": "demo", "prompts": ["ab"], "n": 5}, 422),
        ("/sdapi/v1/txt2img", {"prompt": "ab", "batch_size": 5}, 422),
        ("/v1/images/generations", {"prompt": "ab", "n": 5}, 400),
    ],
)
def test_every_way_in_keeps_the_limit_of_text(
    mill: Deployment, monkeypatch: pytest.MonkeyPatch, path: str, body: dict, status: int
) -> None:
    monkeypatch.setattr(submission, "MAX_TEXT_BYTES", 9)
    answer = mill.client.post(path, json=body)
    assert answer.status_code == status and "have 10 bytes" in answer.text
    if path == "/v1/jobs":
        assert answer.headers["content-type"] == "application/problem+json"
        assert pointers(answer) == ["/prompts"]
