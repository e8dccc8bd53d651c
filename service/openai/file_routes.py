"""Routes of OpenAI Files: upload a batch's input, download its output."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from jobs.errors import FieldProblem, InvalidRequest
from service.context import Context, ServiceContext
from service.http.auth import AnyCaller, Caller
from service.http.body import media_type
from service.http.errors import BodyTooLarge, MalformedBody, UnsupportedBody
from service.http.openapi import binary, openai_errors
from service.openai.batch_schemas import FileDeleted, FileList, FileView
from service.openai.files import Purpose, StoredFile

router = APIRouter(tags=["openai"])

_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                },
                "example": {
                    "file": '{"custom_id": "a", "method": "POST", "url": "/v1/images/generations", '
                    '"body": {"prompt": "a gray ring"}}',
                    "purpose": "batch",
                },
            }
        },
    }
}
_CHUNK = 2**20


class FilePage(BaseModel):
    """Query of the file list."""

    model_config = ConfigDict(extra="forbid")

    purpose: Purpose | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 100
    after: Annotated[str | None, Field(max_length=80, description="The last id seen.")] = None
    order: Literal["desc", "asc"] = "desc"


@router.post(
    "/v1/files",
    response_model=FileView,
    responses=openai_errors(400, 413, 415, 503),
    openapi_extra=_UPLOAD,
)
async def upload_file(request: Request, context: Context, caller: AnyCaller) -> FileView:
    """Store a file of JSON lines as a batch's input."""
    if media_type(request) != "multipart/form-data":
        raise UnsupportedBody("the body must be multipart/form-data")
    limited = Request(request.scope, _limited(request, context.settings.max_file_bytes))
    try:
        async with limited.form(max_files=1, max_fields=8, max_part_size=1000) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise _bad("file", "required")
            if purpose != "batch":
                raise _bad("purpose", "must be batch")
            for name in form.keys() - {"file", "purpose"}:
                raise _bad(name, "unknown field")
            return await anyio.to_thread.run_sync(_keep, context, caller, file)
    except (MultiPartException, ClientDisconnect, UnicodeError) as error:
        raise MalformedBody(f"malformed form: {error}") from error


@router.get("/v1/files", response_model=FileList, responses=openai_errors(400))
def list_files(
    query: Annotated[FilePage, Query()], context: Context, caller: AnyCaller
) -> FileList:
    """The caller's files, a page at a time."""
    files = [
        file for file in context.files.all(caller.tenant) if query.purpose in (None, file.purpose)
    ]
    if query.order == "asc":
        files.reverse()
    page, has_more = page_of([file.id for file in files], query.after, query.limit)
    views = [_view(file) for file in files if file.id in page]
    return FileList(
        data=views,
        has_more=has_more,
        first_id=views[0].id if views else None,
        last_id=views[-1].id if views else None,
    )


@router.get("/v1/files/{file_id}", response_model=FileView, responses=openai_errors(404))
def get_file(file_id: str, context: Context, caller: AnyCaller) -> FileView:
    """A file's name, size and dates."""
    return _view(context.files.get(caller.tenant, file_id))


@router.get(
    "/v1/files/{file_id}/content",
    response_class=Response,
    responses=binary("application/octet-stream") | openai_errors(404),
)
def get_content(file_id: str, context: Context, caller: AnyCaller) -> Response:
    """A file's bytes."""
    file = context.files.get(caller.tenant, file_id)
    path = context.files.path(caller.tenant, file_id)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


@router.delete("/v1/files/{file_id}", response_model=FileDeleted, responses=openai_errors(404))
def delete_file(file_id: str, context: Context, caller: AnyCaller) -> FileDeleted:
    """Delete a file; a batch created from it isn't affected."""
    context.files.remove(caller.tenant, file_id)
    return FileDeleted(id=file_id)


def page_of(ids: Sequence[str], after: str | None, limit: int) -> tuple[set[str], bool]:
    """The ids of a page, and whether more follow. Raises InvalidRequest for an unknown `after`."""
    if after is not None and after not in ids:
        raise _bad("query/after", "must be an id from the list")
    first = 0 if after is None else ids.index(after) + 1
    return set(ids[first : first + limit]), first + limit < len(ids)


def _keep(context: ServiceContext, caller: Caller, file: UploadFile) -> FileView:
    name = (file.filename or "batch.jsonl")[:255].encode("utf-8", "replace").decode()
    with context.files.adding(caller.tenant, name, "batch") as new:
        while chunk := file.file.read(_CHUNK):
            new.target.write(chunk)
    return _view(new.stored)


def _limited(request: Request, limit: int) -> Receive:
    """The request's body; raises BodyTooLarge once it exceeds `limit` bytes."""
    total = 0

    async def receive() -> Message:
        nonlocal total
        message = await request.receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise BodyTooLarge(f"the file is larger than {limit} bytes")
        return message

    return receive


def _bad(name: str, detail: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {detail}", (FieldProblem(f"/{name}", detail),))


def _view(file: StoredFile) -> FileView:
    return FileView(**asdict(file))
