"""Settings of the whole suite."""

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "imagemill",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
"""No example is judged by the clock. Fixtures that last for all examples of a test are meant so."""

settings.load_profile("imagemill")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Don't collect garbage during imports, and exempt what they create from later collections.

    torch and diffusers create a million objects that live until the end.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _the_default_attention_stays() -> Iterator[None]:
    """Every test leaves diffusers' process-wide attention backend as it was."""
    before = _default_attention()
    yield
    assert before is None or _default_attention() == before


def _default_attention() -> Any:
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return dispatch and dispatch._AttentionBackendRegistry.get_active_backend()
