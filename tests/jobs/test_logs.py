"""The form of log lines, whoever writes them."""

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


def test_json_lines_hold_every_field_and_what_is_bound() -> None:
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
def test_a_fault_is_told_with_its_traceback(form: logs.Form) -> None:
    stream = io.StringIO()
    logs.configure(form, stream)
    try:
        raise RuntimeError("why")
    except RuntimeError:
        structlog.get_logger().exception("it broke")
    said = stream.getvalue()
    assert "RuntimeError: why" in said and "it broke" in said
    assert (len(said.splitlines()) == 1) == (form == "json")


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_fault_s_log_is_short_and_holds_no_variables(form: logs.Form) -> None:
    stream = io.StringIO()
    logs.configure(form, stream)

    def deep(levels: int, shown: str) -> None:
        many = [shown] * 1000
        if levels:
            deep(levels - 1, many[0])
        raise RuntimeError("why")

    try:
        deep(50, "im_" + "secret")
    except RuntimeError:
        logging.getLogger("a.server").exception("it broke")
    said = stream.getvalue()
    assert "RuntimeError: why" in said
    assert "im_secret" not in said and len(said.splitlines()) < 250


def test_for_people_a_line_reads_as_one() -> None:
    stream = io.StringIO()
    logs.configure("console", stream)
    structlog.get_logger("jobs").warning("careful", model="demo")
    assert "careful" in stream.getvalue() and "model=demo" in stream.getvalue()
    assert "\033" not in stream.getvalue()
