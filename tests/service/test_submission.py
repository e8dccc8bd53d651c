"""Expansion of a POST into image requests, as a pure function; bodies made by Hypothesis."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.errors import InvalidRequest
from jobs.request import MAX_SEED
from service.schemas import SubmitJob
from service.submission import image_requests
from tests.service.conftest import CATALOG, Deployment

DEMO = CATALOG.get("demo")
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
@settings(deadline=None, max_examples=60)
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
@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_body_is_a_fault(mill: Deployment, body: object) -> None:
    if isinstance(body, dict):
        body = {"model": "demo", "prompts": ["a"], **body}
    answer = mill.client.post(
        "/v1/jobs", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (202, 400, 404, 422)


@given(body=st.binary(max_size=200))
@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
