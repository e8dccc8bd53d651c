"""The format of log lines, both our own and those of libraries."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from jobs.runtime import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before, handlers = structlog.get_config(), logging.getLogger().handlers[:]
    yield
    structlog.configure(**before)
    logging.getLogger().handlers[:] = handlers


def test_json_lines_have_every_field_and_the_bound_ones() -> None:
    stream = io.StringIO()
    logs.configure("json", stream)
    with structlog.contextvars.bound_contextvars(image="job1:3"):
        structlog.get_logger("workers.delivery").warning("image failed", attempt=2)
    logging.getLogger("a.library").info("on %s", "x", extra={"color_message": "c"})
    structlog.get_logger("quiet").debug("never")
    logging.getLogger("httpx").info("never")
    ours, theirs = map(json.loads, stream.getvalue().splitlines())
    assert ours.pop("timestamp").endswith("Z") and theirs.pop("timestamp")
    assert ours == {
        "message": "image failed",
        "level": "warning",
        "logger": "workers.delivery",
        "attempt": 2,
        "image": "job1:3",
    }
    assert theirs == {"message": "on x", "level": "info", "logger": "a.library"}


@pytest.mark.parametrize("form", ["json", "console"])
def test_an_exception_is_logged_with_its_traceback(form: logs.Form) -> None:
    stream = io.StringIO()
    logs.configure(form, stream)
    try:
        raise RuntimeError("why")
    except RuntimeError:
        structlog.get_logger().exception("it broke")
    text = stream.getvalue()
    assert "RuntimeError: why" in text and "it broke" in text
    assert (len(text.splitlines()) == 1) == (form == "json")


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_logged_exception_is_short_and_has_no_variables(form: logs.Form) -> None:
    stream = io.StringIO()
    logs.configure(form, stream)

    def deep(levels: int, secret: str) -> None:
        copies = [secret] * 1000
        if levels:
            deep(levels - 1, copies[0])
        raise RuntimeError("why")

    try:
        deep(50, "im_" + "secret")
    except RuntimeError:
        logging.getLogger("a.server").exception("it broke")
    text = stream.getvalue()
    assert "RuntimeError: why" in text
    assert "im_secret" not in text and len(text.splitlines()) < 250


def test_console_lines_are_plain_text() -> None:
    stream = io.StringIO()
    logs.configure("console", stream)
    structlog.get_logger("jobs").warning("careful", model="demo")
    assert "careful" in stream.getvalue() and "model=demo" in stream.getvalue()
    assert "\033" not in stream.getvalue()
