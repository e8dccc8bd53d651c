"""A batch's input file as jobs: every line checked, lines of one model and priority together.

A line whose request cannot be accepted is refused by itself and hinders no other. What cannot be
laid to one request (no JSON, no `custom_id` of its own, another route) is an error of the file.
Pure: reads lines, knows no store.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from jobs.catalog import Catalog, Model
from jobs.errors import FieldProblem, InvalidRequest, UnknownModel
from jobs.request import ImageRequest
from service.http.body import parse
from service.http.errors import MalformedBody, failure_of, invalid, openai_error
from service.openai.answers import Form
from service.openai.batch_schemas import BatchErrorView, BatchLine
from service.submit.schemas import MAX_TEXT_BYTES
from service.submit.submission import Card, image_requests, text_bytes

MAX_LINES = 50_000
MAX_ERRORS = 1000
"""Errors of a file that are named; reading ends there."""

_OF_THE_FILE = frozenset({"", "custom_id", "method", "url"})
"""Fields of a line that must be right, or it is nobody's request to this API."""


@dataclass(frozen=True, slots=True)
class PlannedLine:
    """Where a line's images are: `count` of them, from `first` on, in the job at `job`."""

    custom_id: str
    job: int
    first: int
    count: int
    form: Form


@dataclass(frozen=True, slots=True)
class RefusedLine:
    """A line whose request cannot be accepted, and why, as OpenAI's envelope holds it."""

    custom_id: str
    error: dict[str, str | None]


@dataclass(slots=True)
class PlannedJob:
    """A job to be: images of one model and priority, and the bytes of their texts."""

    model: Model
    priority: int
    requests: list[ImageRequest] = field(default_factory=list)
    size: int = 0

    def takes(self, count: int, size: int) -> bool:
        """Whether it may hold so many more images with so many bytes of text."""
        fits = len(self.requests) + count <= self.model.limits.max_prompts
        return fits and self.size + size <= MAX_TEXT_BYTES


@dataclass(slots=True)
class Plan:
    """What an input file asks for; nothing may be queued if there are `errors`."""

    jobs: list[PlannedJob] = field(default_factory=list)
    lines: list[PlannedLine] = field(default_factory=list)
    refused: list[RefusedLine] = field(default_factory=list)
    errors: list[BatchErrorView] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides about a request: the catalog, the models' cards, and the caller's priorities.

    `priority_of` gives the priority for the one that a request names, if it may have it.
    """

    catalog: Catalog
    card_of: Callable[[str], Card | None]
    priority_of: Callable[[int | None], int]


def plan(raw: Iterable[bytes], rules: Rules) -> Plan:
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
            line = _line(parse(text))
            if line.custom_id in seen:
                detail = f"line {seen[line.custom_id]} has the same custom_id"
                raise InvalidRequest(detail, (FieldProblem("/custom_id", detail),))
            seen[line.custom_id] = number
            refused = line if isinstance(line, RefusedLine) else _add(made, current, line, rules)
            if refused is not None:
                made.refused.append(refused)
        except (InvalidRequest, MalformedBody) as error:
            made.errors += _errors(number, error)
    if not (seen or made.errors):
        made.errors.append(_error(None, "empty_file", "the input file has no lines"))
    return made


def _line(value: Any) -> BatchLine | RefusedLine:
    """A line, or its refusal. Raises InvalidRequest for an error of the file."""
    try:
        return BatchLine.model_validate(value)
    except ValidationError as error:
        refusal = invalid(error)
    problems = [one for one in refusal.problems if _field(one) in _OF_THE_FILE]
    if problems:
        raise InvalidRequest(str(refusal), tuple(problems))
    body = [replace(one, pointer=one.pointer.removeprefix("/body")) for one in refusal.problems]
    return _refused(value["custom_id"], InvalidRequest(str(refusal), tuple(body)))


def _field(problem: FieldProblem) -> str:
    return problem.pointer.removeprefix("/").partition("/")[0]


def _add(
    made: Plan, current: dict[tuple[str, int], int], line: BatchLine, rules: Rules
) -> RefusedLine | None:
    """Put a line's images into the job of its model and priority that is being filled."""
    try:
        requests = _requests(line, rules)
        priority = rules.priority_of(line.body.priority)
    except InvalidRequest as error:
        return _refused(line.custom_id, error)
    model = rules.catalog.get(requests[0].model)
    key = (model.name, priority)
    place, size = current.get(key), len(requests) * text_bytes(requests[0])
    if place is None or not made.jobs[place].takes(len(requests), size):
        place = current[key] = len(made.jobs)
        made.jobs.append(PlannedJob(model, priority))
    job = made.jobs[place]
    form = line.body.response_format or "url"
    made.lines.append(PlannedLine(line.custom_id, place, len(job.requests), len(requests), form))
    job.requests += requests
    job.size += size
    return None


def _refused(custom_id: str, error: InvalidRequest) -> RefusedLine:
    return RefusedLine(custom_id, openai_error(failure_of(error)))


def _requests(line: BatchLine, rules: Rules) -> Sequence[ImageRequest]:
    """A line's images; problems are named by the fields of the line's body."""
    try:
        job = line.body.as_job(next(iter(rules.catalog)).name)
        model = rules.catalog.get(job.model)
        return image_requests(job, model, rules.card_of(model.name))
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
    return [
        _error(number, "invalid_request", problem.detail, problem.pointer.removeprefix("/"))
        for problem in error.problems
    ]


def _error(line: int | None, code: str, message: str, param: str | None = None) -> BatchErrorView:
    return BatchErrorView(code=code, line=line, message=message, param=param)
