"""Logging setup: one line per event, for people (`console`) or programs (`json`).

Everything goes through structlog, including the standard library's loggers, so that lines from
uvicorn and redis look like ours. Fields bound with `structlog.contextvars` (a request's id, an
image's key) appear in every line of that request or image. Callers decide what to log, and at
which level.
"""

import logging
import sys
from typing import Literal, TextIO

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

Form = Literal["console", "json"]

_QUIET = ("httpx", "httpcore", "opentelemetry")
"""Libraries that log every call they make; only their warnings are shown."""


def configure(form: Form, stream: TextIO | None = None) -> None:
    """Send the whole process's logs to `stream` (default: standard error)."""
    target = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _without_colour],
            processors=[
                _named,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(form, target),
            ],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _renderers(form: Form, target: TextIO) -> list[Processor]:
    if form == "console":
        plain = structlog.dev.plain_traceback  # others print local variables, including API keys
        return [structlog.dev.ConsoleRenderer(colors=target.isatty(), exception_formatter=plain)]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("message"),
        structlog.processors.JSONRenderer(default=str),
    ]


def _named(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Add the name of the module that logs."""
    event["logger"] = event["_record"].name
    return event


def _without_colour(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Drop Uvicorn's second, coloured copy of its message."""
    event.pop("color_message", None)
    return event
