"""A model's own defaults: the entry's take precedence, and the rest is clamped to the limits."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.catalog import DERIVED, Defaults, Limits, Model, problems
from jobs.defaults import as_published, to_publish, with_own_defaults
from jobs.reports import ModelCard
from jobs.request import ImageRequest

OWN = Defaults(512, 768, 4, 0.0)


def test_the_entry_takes_precedence_field_by_field() -> None:
    of_entry = Defaults(width=256, guidance_scale=2.0, negative_prompt="blur")
    model = Model("m", "x", defaults=of_entry, unset=("height", "steps"))
    assert with_own_defaults(model, OWN).defaults == Defaults(256, 768, 4, 2.0, "blur")
    assert with_own_defaults(Model("m", "x"), OWN).defaults == Defaults()


@given(
    own=st.builds(
        Defaults,
        width=st.integers(1024, 4096),
        height=st.integers(1024, 4096),
        steps=st.integers(1, 1000),
        guidance_scale=st.floats(0, 100),
    ),
    limits=st.builds(
        Limits,
        max_pixels=st.integers(2**16, 2**24),
        max_steps=st.integers(1, 300),
        max_guidance_scale=st.floats(0, 50),
        multiple=st.sampled_from([1, 8, 16, 24, 64]),
        sizes=st.sampled_from([(), ((192, 192),), ((384, 192), (192, 384))]),
    ),
)
def test_own_defaults_are_clamped_to_the_limits(own: Defaults, limits: Limits) -> None:
    limits = replace(limits, max_pixels=max(2**17, limits.max_pixels)) if limits.sizes else limits
    model = with_own_defaults(Model("m", "x", limits=limits, unset=DERIVED), own)
    clamped = model.defaults
    size = (clamped.width, clamped.height)
    request = ImageRequest("m", "a", 0, *size, clamped.steps, clamped.guidance_scale)
    assert problems(Model("m", "x", limits=limits), request, "") == []
    if not limits.sizes and own.width * own.height <= limits.max_pixels:
        assert own.width - clamped.width in range(limits.multiple)
        assert own.height - clamped.height in range(limits.multiple)


def test_a_card_has_only_what_the_entry_leaves_open() -> None:
    entry = Model("m", "/here/models/flux", local=True, unset=("width", "steps"))
    card = to_publish(entry, with_own_defaults(entry, OWN))
    assert card == ModelCard("models/flux", {"width": 512, "steps": 4})
    elsewhere = Model("m", "/mnt/models/flux", local=True, unset=("width", "height", "steps"))
    model = as_published(elsewhere, card)
    assert (model.defaults.width, model.defaults.steps, model.unset) == (512, 4, ("height",))


@pytest.mark.parametrize("card", [None, ModelCard(), ModelCard("x@main", {"steps": 4})])
def test_a_card_of_other_weights_is_ignored(card: ModelCard | None) -> None:
    model = Model("m", "x", revision="v2", unset=DERIVED)
    assert as_published(model, card) == model
