"""How a process logs: one line an event, for people (`console`) or for programs (`json`).

Everything goes through structlog, the standard library's loggers included, so that the lines of
uvicorn and of redis look like our own. Fields bound by `structlog.contextvars` (the request's id,
an image's key) are in every line of the same request or flight. Decides no level for anybody: what
is worth a line is the caller's business.
"""

import logging
import sys
from typing import Literal, TextIO

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

Form = Literal["console", "json"]

_QUIET = ("httpx", "httpcore", "opentelemetry")
"""Libraries that tell of every call they make; of theirs, only warnings."""


def configure(form: Form, stream: TextIO | None = None) -> None:
    """Log to `stream` (standard error) from now on, in this whole process."""
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
        plain = structlog.dev.plain_traceback  # the other ones show local variables, keys too
        return [structlog.dev.ConsoleRenderer(colors=target.isatty(), exception_formatter=plain)]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("message"),
        structlog.processors.JSONRenderer(default=str),
    ]


def _named(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Which module speaks."""
    event["logger"] = event["_record"].name
    return event


def _without_colour(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Uvicorn brings its message a second time, in colours."""
    event.pop("color_message", None)
    return event
