"""The JSON of requests and responses: field names, types, and bounds that apply to every model.

A model's own limits are narrower and are checked by the catalog. Input is strict: a string isn't a
number, 8.0 isn't an integer, unknown fields are refused, and null means the same as omitting the
field. Doesn't depend on the store; `service/read/views.py` builds the responses.
"""

import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
)

from jobs.fields import FIELDS, PROMPT
from jobs.job import State, WebhookEvent
from jobs.request import ImageFormat

MAX_METADATA_BYTES = 16 * 2**10

MAX_TEXT_BYTES = 16 * 2**20
"""Limit on the prompts and negative prompts of a job, in JSON; each copy counts separately."""


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


_WEB = r"^https?://[A-Za-z0-9]"


def _web_address(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(letter.isspace() or not letter.isprintable() for letter in text):
        raise ValueError("must be an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain credentials")
    return text


def _storable(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        size = len(json.dumps(metadata, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise ValueError("must not contain a lone surrogate") from None
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"must be at most {MAX_METADATA_BYTES} bytes of JSON, not {size}")
    return metadata


def bounds(name: str, **overrides: Any) -> Any:
    """The pydantic `Field` of a number or flag, with bounds and description from `FIELDS`."""
    field = FIELDS[name]
    facts = {"ge": field.minimum, "le": field.maximum, "description": field.help}
    return Field(**facts | overrides)


Prompt = Annotated[
    str,
    Field(
        min_length=PROMPT.minimum,
        max_length=PROMPT.maximum,
        json_schema_extra={"pattern": r"^[^\u0000]*[^\u0000\s][^\u0000]*$"},  # nor blank
    ),
    AfterValidator(_without_nul),
    AfterValidator(_not_blank),
]
AnyPrompt = Annotated[
    str,
    Field(max_length=PROMPT.maximum, json_schema_extra={"pattern": r"^[^\u0000]*$"}),
    AfterValidator(_without_nul),
]
"""A prompt that may be empty."""
NegativePrompt = Annotated[
    str,
    Field(
        max_length=FIELDS["negative_prompt"].maximum,
        description=FIELDS["negative_prompt"].help,
        json_schema_extra={"pattern": r"^[^\u0000]*$"},
    ),
    AfterValidator(_without_nul),
]
Side = Annotated[int, bounds("width")]


class Input(BaseModel):
    """Base class of request bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ImageSettings(Input):
    """An image's settings; missing ones come from the job, then from the catalog."""

    negative_prompt: NegativePrompt | None = None
    seed: Annotated[int | None, bounds("seed")] = None
    width: Side | None = None
    height: Side | None = None
    steps: Annotated[int | None, bounds("steps")] = None
    guidance_scale: Annotated[float | None, bounds("guidance_scale")] = None
    n: Annotated[int | None, bounds("n")] = None


class PromptItem(ImageSettings):
    """A prompt with its own settings."""

    prompt: Prompt


def _entry_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<item>" if isinstance(value, dict | PromptItem) else None


PromptEntry = Annotated[
    Annotated[Prompt, Tag("<text>")] | Annotated[PromptItem, Tag("<item>")],
    Discriminator(
        _entry_kind,
        custom_error_type="prompt_entry",
        custom_error_message="must be a string or an object with a prompt",
    ),
]


class Webhook(Input):
    """The URL to notify, and the events to report."""

    url: Annotated[
        str,
        Field(min_length=8, max_length=2048, json_schema_extra={"format": "uri", "pattern": _WEB}),
        AfterValidator(_web_address),
    ]
    events: Annotated[list[WebhookEvent], Field(min_length=1, max_length=5)] = [
        "job.succeeded",
        "job.failed",
        "job.cancelled",
    ]


class SubmitJob(ImageSettings):
    """A batch of prompts for one model."""

    model: Annotated[str, Field(min_length=1, max_length=100)]
    prompts: Annotated[
        list[PromptEntry],
        Field(
            min_length=1,
            max_length=100_000,
            description="Strings, or objects with a prompt. Prompts and negative prompts of all "
            f"images, including copies, can have at most {MAX_TEXT_BYTES} bytes of JSON.",
        ),
    ]
    priority: Annotated[int, bounds("priority")] = 5
    format: Annotated[ImageFormat, bounds("format")] = "png"
    reproducible: Annotated[bool, bounds("reproducible")] = True
    webhook: Webhook | None = None
    metadata: Annotated[
        dict[str, JsonValue],
        Field(description=f"Stored and returned unchanged; at most {MAX_METADATA_BYTES} bytes."),
        AfterValidator(_storable),
    ] = {}


class CountsView(BaseModel):
    """Number of a job's images by state; the states add up to `total`."""

    total: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int


class ImageItem(BaseModel):
    """One image of a job. `url` and the fields after it are null until it's finished."""

    index: int
    state: State
    prompt: str
    negative_prompt: str | None
    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float
    format: ImageFormat
    reproducible: bool
    step: Annotated[int, Field(description="Denoising steps done, as reported by the worker.")]
    attempts: int
    error: str | None
    url: str | None
    sha256: str | None
    size: Annotated[int | None, Field(description="Bytes.")]
    media_type: str | None
    seconds: Annotated[float | None, Field(description="From claim to commit.")]
    warnings: Annotated[
        list[str], Field(description="What may surprise about this image, once it's finished.")
    ] = []


class JobUrls(BaseModel):
    """URLs of a job's resources."""

    self: str
    events: str
    cancel: str
    retry: str
    zip: str
    sheet: str


class UndeliveredView(BaseModel):
    """A message that the webhook's receiver hasn't accepted."""

    id: Annotated[str, Field(description="As in the header webhook-id.")]
    event: str
    attempts: int
    last_attempt: float
    reason: Annotated[str, Field(description="Why the last attempt failed.")]
    next_attempt: Annotated[float | None, Field(description="Null if it was given up.")]


class WebhookView(BaseModel):
    """A job's webhook, and its newest messages that weren't delivered."""

    url: str
    events: list[WebhookEvent]
    undelivered: list[UndeliveredView]


class JobSummary(BaseModel):
    """A job without its images. Times are seconds since the epoch."""

    id: str
    model: str
    state: State
    progress: Annotated[float, Field(ge=0, le=1, description="Share of denoising steps done.")]
    priority: int
    counts: CountsView
    created: float
    started: float | None
    finished: float | None
    expires: Annotated[float | None, Field(description="When the job and its files are removed.")]
    metadata: dict[str, JsonValue]
    urls: JobUrls


class JobView(JobSummary):
    """A job with its images."""

    queue_position: Annotated[
        int | None, Field(description="Images ahead of this job's next one; null if none waits.")
    ]
    eta_seconds: Annotated[
        float | None,
        Field(description="Seconds until the last image, at the measured rate; null if unknown."),
    ]
    warnings: Annotated[
        list[str], Field(description="What was accepted but may not do what you expect.")
    ] = []
    webhook: WebhookView | None
    images: list[ImageItem]


class JobEvent(JobSummary):
    """A job without its images, as sent in its event stream."""

    queue_position: int | None


class JobPage(BaseModel):
    """A page of jobs, newest first. `next` is the next page's cursor; null on the last page."""

    data: list[JobSummary]
    next: str | None


class ModelView(BaseModel):
    """A model of the catalog: OpenAI's fields plus our own."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    dtype: str
    placement: str
    defaults: Annotated[
        dict[str, JsonValue],
        Field(
            description="The catalog entry's, else the model's own. A null size, steps or "
            "guidance_scale isn't known until a worker has read the model."
        ),
    ]
    limits: dict[str, JsonValue]
    card: Annotated[
        dict[str, JsonValue] | None,
        Field(description="What a worker reported when it loaded the model."),
    ]
    ready_workers: int
    queued: Annotated[int, Field(description="Images queued for this model.")]


class ModelList(BaseModel):
    """The catalog, in the file's order."""

    object: Literal["list"] = "list"
    data: list[ModelView]


class WorkerView(BaseModel):
    """A worker's last report; it may have more fields."""

    model_config = ConfigDict(extra="allow")

    id: str
    model: str | None
    state: str


class WorkerList(BaseModel):
    """Workers that reported recently."""

    data: list[WorkerView]


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Images can be generated. `models` maps every model to its number of ready workers."""

    status: Literal["ready"] = "ready"
    models: dict[str, int]


class FieldProblemView(BaseModel):
    """One invalid field: a JSON pointer into the body, or /query, /path or /header and a name."""

    pointer: str
    detail: str


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblemView]
