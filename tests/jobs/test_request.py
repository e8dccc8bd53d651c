"""Requests survive a round trip through JSON."""

from hypothesis import given
from hypothesis import strategies as st

from jobs.queue.decode import packed
from jobs.request import MAX_SEED, ImageRequest
from tests.jobs.bench import request

prompts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@given(
    st.builds(
        ImageRequest,
        model=st.just("demo"),
        prompt=prompts,
        seed=st.integers(0, MAX_SEED),
        width=st.integers(16, 4096),
        height=st.integers(16, 4096),
        steps=st.integers(1, 200),
        guidance_scale=st.floats(0, 30),
        negative_prompt=st.none() | prompts,
        format=st.sampled_from(["png", "jpeg", "webp"]),
        reproducible=st.booleans(),
    )
)
def test_json_keeps_every_field(original: ImageRequest) -> None:
    assert ImageRequest.from_json(original.to_json()) == original
    head, _, body = packed(original).partition("\n")
    assert head == f"{original.width} {original.height} {original.steps}"
    assert ImageRequest.from_json(body) == original


def test_pixels_are_width_times_height() -> None:
    assert request(width=1000, height=500, steps=4).pixels == 500_000
