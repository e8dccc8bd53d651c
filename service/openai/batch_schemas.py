"""The JSON of OpenAI's Files and Batches, and of a batch's input lines. No store here."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator

from service.openai.files import Purpose
from service.openai.schemas import GenerateImages
from service.submit.schemas import Input

ENDPOINT = "/v1/images/generations"

BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]


class BatchBody(GenerateImages):
    """The request in one line. `response_format` defaults to `url`, to keep output files small."""

    @field_validator("stream")
    @classmethod
    def _no_stream(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("batches don't support streaming")
        return value


class BatchLine(Input):
    """One line of an input file."""

    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Literal["/v1/images/generations"]
    body: BatchBody


class CreateBatch(Input):
    """`POST /v1/batches`."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=80)]
    endpoint: Literal["/v1/images/generations"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None


class FileView(BaseModel):
    """OpenAI's file object."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """A page of files, newest first."""

    object: Literal["list"] = "list"
    data: list[FileView]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(BaseModel):
    """The response to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchErrorView(BaseModel):
    """An error in one line; lines are numbered from 1."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    """Why a batch could not be started."""

    object: Literal["list"] = "list"
    data: list[BatchErrorView]


class RequestCounts(BaseModel):
    """Number of a batch's lines by outcome."""

    total: int
    completed: int
    failed: int


class BatchView(BaseModel):
    """OpenAI's batch object, plus the jobs behind it."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None = None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None
    jobs: Annotated[list[str], Field(description="Ids of its jobs, for /v1/jobs.")]


class BatchList(BaseModel):
    """A page of batches, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchView]
    has_more: bool
    first_id: str | None
    last_id: str | None
