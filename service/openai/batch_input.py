"""Turns a batch's input file into jobs: checks every line, groups lines by model and priority.

An invalid request only fails its own line. A line that can't be attributed to a request (invalid
JSON, missing or duplicate `custom_id`, wrong route) is an error of the whole file. Pure: reads
lines, doesn't depend on the store.
"""

from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from jobs.catalog import Catalog, Model
from jobs.errors import FieldProblem, InvalidRequest, UnknownModel
from jobs.reports import ModelCard
from jobs.request import ImageRequest
from service.http.body import parse
from service.http.errors import (
    MalformedBody,
    failure_of,
    invalid,
    openai_error,
    openai_field_error,
    openai_param,
)
from service.openai.answers import Form
from service.openai.batch_schemas import ENDPOINT, BatchErrorView, BatchLine
from service.openai.engine_fields import as_served
from service.submit.schemas import MAX_TEXT_BYTES
from service.submit.submission import copies_of, image_requests, text_bytes

MAX_LINES = 50_000
MAX_ERRORS = 1000
"""Errors reported per file; reading stops there."""

_DUPLICATE = "duplicate custom_id"

_OF_THE_FILE = frozenset({"", "custom_id", "method", "url"})
"""Fields that identify a line's request; an invalid one is an error of the whole file."""


@dataclass(frozen=True, slots=True)
class PlannedLine:
    """Where a line's images are: `count` of them, starting at `first`, in job number `job`."""

    custom_id: str
    job: int
    first: int
    count: int
    form: Form


@dataclass(frozen=True, slots=True)
class RefusedLine:
    """A line with an invalid request, and its `error` as in OpenAI's envelope."""

    custom_id: str
    error: dict[str, str | None]


@dataclass(slots=True)
class PlannedJob:
    """A job to submit: images of one model and priority, and the size of their texts in bytes."""

    model: Model
    priority: int
    requests: list[ImageRequest] = field(default_factory=list)
    size: int = 0

    def takes(self, count: int, size: int) -> bool:
        """Whether `count` more images with `size` bytes of text fit into the job."""
        fits = len(self.requests) + count <= self.model.limits.max_prompts
        return fits and self.size + size <= MAX_TEXT_BYTES


@dataclass(slots=True)
class BatchPlan:
    """The jobs of an input file; nothing may be queued if there are `errors`."""

    jobs: list[PlannedJob] = field(default_factory=list)
    lines: list[PlannedLine] = field(default_factory=list)
    refused: list[RefusedLine] = field(default_factory=list)
    errors: list[BatchErrorView] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request is checked against: catalog, model cards, and the caller's priorities.

    `priority_of` returns the job's priority for the one in the request, or raises InvalidRequest.
    `patterns` has an image for each combination of settings that has passed; used for one file.
    """

    catalog: Catalog
    card_of: Callable[[str], ModelCard | None]
    priority_of: Callable[[int | None], int]
    patterns: dict[tuple[Any, ...], ImageRequest] = field(default_factory=dict)


def plan(raw: Iterable[bytes], rules: Rules) -> BatchPlan:
    """The jobs and lines of an input file, or its errors."""
    batch, seen, current = BatchPlan(), dict[str, int](), dict[tuple[str, int], int]()
    number = 0
    for number, text in enumerate(raw, start=1):
        if number > MAX_LINES:
            batch.errors.append(_error(number, "too_many_lines", f"more than {MAX_LINES} lines"))
        if len(batch.errors) >= MAX_ERRORS or number > MAX_LINES:
            break
        if not text.removeprefix(BOM_UTF8).strip():
            continue
        try:
            line = _line(parse(text))
            if line.custom_id in seen:
                detail = f"{_DUPLICATE}, already used in line {seen[line.custom_id]}"
                raise InvalidRequest(detail, (FieldProblem("/custom_id", detail),))
            seen[line.custom_id] = number
            refused = line if isinstance(line, RefusedLine) else _add(batch, current, line, rules)
            if refused is not None:
                batch.refused.append(refused)
        except (InvalidRequest, MalformedBody) as error:
            batch.errors += _errors(number, error)
    if not (seen or batch.errors):
        batch.errors.append(_error(None, "empty_file", "the input file is empty"))
    return batch


def _line(value: Any) -> BatchLine | RefusedLine:
    """A line, or its refusal. Raises InvalidRequest for an error of the file."""
    try:
        return BatchLine.model_validate(value)
    except ValidationError as error:
        refusal = invalid(error)
    problems = [problem for problem in refusal.problems if _field(problem) in _OF_THE_FILE]
    if problems:
        raise InvalidRequest(str(refusal), tuple(problems))
    body = [
        replace(problem, pointer=problem.pointer.removeprefix("/body"))
        for problem in refusal.problems
    ]
    return _refused(value["custom_id"], InvalidRequest(str(refusal), tuple(body)))


def _field(problem: FieldProblem) -> str:
    return problem.pointer.removeprefix("/").partition("/")[0]


def _add(
    batch: BatchPlan, current: dict[tuple[str, int], int], line: BatchLine, rules: Rules
) -> RefusedLine | None:
    """Add a line's images to the current job of its model and priority, or start another job."""
    try:
        requests = _requests(line, rules)
        priority = rules.priority_of(line.body.priority)
    except InvalidRequest as error:
        return _refused(line.custom_id, error)
    model = rules.catalog.get(requests[0].model)
    key = (model.name, priority)
    place, size = current.get(key), len(requests) * text_bytes(requests[0])
    if place is None or not batch.jobs[place].takes(len(requests), size):
        place = current[key] = len(batch.jobs)
        batch.jobs.append(PlannedJob(model, priority))
    job = batch.jobs[place]
    form = line.body.response_format or "url"
    batch.lines.append(PlannedLine(line.custom_id, place, len(job.requests), len(requests), form))
    job.requests += requests
    job.size += size
    return None


def _refused(custom_id: str, error: InvalidRequest) -> RefusedLine:
    return RefusedLine(custom_id, openai_error(failure_of(error)))


def _requests(line: BatchLine, rules: Rules) -> Sequence[ImageRequest]:
    """A line's images; problems refer to the fields of the line's body.

    Most lines of a file differ in prompt and seed only, so the images of the first line with the
    same settings are the pattern for the others, which saves most of the time.
    """
    body = line.body
    settings = tuple(value for name, value in body.__dict__.items() if name not in _VARYING)
    pattern = rules.patterns.get(settings) if _is_plain(body.prompt, settings) else None
    if pattern is not None:
        return copies_of(replace(pattern, prompt=body.prompt), body.seed, body.n or 1)
    requests = _checked(line, rules)
    if _is_plain(body.prompt, settings):
        rules.patterns[settings] = requests[0]
    return requests


_VARYING = frozenset({"prompt", "seed", "user", "priority", "response_format"})
"""Fields of a line that don't affect how its other fields are checked."""


def _is_plain(prompt: str, settings: tuple[Any, ...]) -> bool:
    """Whether the prompt needs no check but the schema's, and the settings can be a key."""
    is_text = prompt.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in prompt)
    return is_text and not any(isinstance(value, dict | list) for value in settings)


def _checked(line: BatchLine, rules: Rules) -> Sequence[ImageRequest]:
    try:
        model = rules.catalog.get(line.body.model or next(iter(rules.catalog)).name)
        card = rules.card_of(model.name)
        job = as_served(line.body, card).as_job(model.name)
        return image_requests(job, model, card)
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
    return [_line_error(number, problem) for problem in error.problems]


def _line_error(number: int, problem: FieldProblem) -> BatchErrorView:
    """OpenAI's error for a line whose request can't be identified."""
    code, message = openai_field_error(problem)
    if problem.pointer == "/custom_id" and problem.detail.startswith(_DUPLICATE):
        code, message = "duplicate_custom_id", problem.detail
    elif problem.pointer == "/url" and code == "invalid_value":
        code = "url_mismatch"
        message = f"The URL must be the batch's endpoint, {ENDPOINT}: {problem.detail}"
    return _error(number, code, message, openai_param(problem))


def _error(line: int | None, code: str, message: str, param: str | None = None) -> BatchErrorView:
    return BatchErrorView(code=code, line=line, message=message, param=param)
