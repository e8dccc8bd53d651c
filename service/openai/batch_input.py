"""A batch's input file as jobs: every line checked, lines of one model and priority together.

Pure: reads lines, knows no store. Either all lines are good, or every bad one is named.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from jobs.catalog import Catalog, Model
from jobs.errors import FieldProblem, InvalidRequest, UnknownModel
from jobs.request import ImageRequest
from service.body import parse
from service.errors import MalformedBody, invalid
from service.openai.answers import Form
from service.openai.batch_schemas import BatchErrorView, BatchLine
from service.submission import Card, image_requests

MAX_LINES = 50_000
MAX_ERRORS = 1000
"""Bad lines that are named; reading ends there."""


@dataclass(frozen=True, slots=True)
class PlannedLine:
    """Where a line's images are: `count` of them, from `first` on, in the job at `job`."""

    custom_id: str
    job: int
    first: int
    count: int
    form: Form


@dataclass(slots=True)
class PlannedJob:
    """A job to be: images of one model and priority."""

    model: Model
    priority: int
    requests: list[ImageRequest] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """What an input file asks for; nothing may be queued if there are `errors`."""

    jobs: list[PlannedJob] = field(default_factory=list)
    lines: list[PlannedLine] = field(default_factory=list)
    errors: list[BatchErrorView] = field(default_factory=list)


def plan(raw: Iterable[bytes], catalog: Catalog, card_of: Callable[[str], Card | None]) -> Plan:
    """The jobs and lines of an input file, or its errors."""
    made, seen, current = Plan(), dict[str, int](), dict[tuple[str, int], int]()
    number = 0
    for number, text in enumerate(raw, start=1):
        if number > MAX_LINES:
            made.errors.append(_error(number, "too_many_lines", f"at most {MAX_LINES} lines"))
        if len(made.errors) >= MAX_ERRORS or number > MAX_LINES:
            break
        if not text.strip():
            continue
        try:
            line = _line(text)
            if line.custom_id in seen:
                detail = f"line {seen[line.custom_id]} has the same custom_id"
                raise InvalidRequest(detail, (FieldProblem("/custom_id", detail),))
            seen[line.custom_id] = number
            _add(made, current, line, catalog, card_of)
        except (InvalidRequest, MalformedBody) as error:
            made.errors += _errors(number, error)
    if not (made.lines or made.errors):
        made.errors.append(_error(None, "empty_file", "the input file has no lines"))
    return made


def _line(text: bytes) -> BatchLine:
    try:
        return BatchLine.model_validate(parse(text))
    except ValidationError as error:
        raise invalid(error) from error


def _add(
    made: Plan,
    current: dict[tuple[str, int], int],
    line: BatchLine,
    catalog: Catalog,
    card_of: Callable[[str], Card | None],
) -> None:
    """Put a line's images into the job of its model and priority that is being filled."""
    requests = _requests(line, catalog, card_of)
    model = catalog.get(requests[0].model)
    key = (model.name, line.body.priority)
    place = current.get(key)
    if place is None or len(made.jobs[place].requests) + len(requests) > model.limits.max_prompts:
        place = current[key] = len(made.jobs)
        made.jobs.append(PlannedJob(model, line.body.priority))
    job = made.jobs[place]
    form = line.body.response_format or "url"
    made.lines.append(PlannedLine(line.custom_id, place, len(job.requests), len(requests), form))
    job.requests += requests


def _requests(
    line: BatchLine, catalog: Catalog, card_of: Callable[[str], Card | None]
) -> Sequence[ImageRequest]:
    """A line's images; problems are named by the fields of the line."""
    try:
        job = line.body.as_job(next(iter(catalog)).name)
        model = catalog.get(job.model)
        return image_requests(job, model, card_of(model.name))
    except ValidationError as error:
        refusal = invalid(error)
    except UnknownModel:
        raise
    except InvalidRequest as error:
        refusal = error
    raise InvalidRequest(str(refusal), tuple(map(line.body.field_of, refusal.problems)))


def _errors(number: int, error: InvalidRequest | MalformedBody) -> list[BatchErrorView]:
    if isinstance(error, MalformedBody):
        return [_error(number, "invalid_json_line", str(error))]
    code = "unknown_model" if isinstance(error, UnknownModel) else "invalid_request"
    return [
        _error(number, code, problem.detail, problem.pointer.removeprefix("/").replace("/", "."))
        for problem in error.problems
    ]


def _error(line: int | None, code: str, message: str, param: str | None = None) -> BatchErrorView:
    return BatchErrorView(code=code, line=line, message=message, param=param)
