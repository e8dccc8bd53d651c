"""A job's images: full size with ranges and preconditions, thumbnails, ZIP, contact sheet.

An image can only be downloaded once it's committed, which is after its file was fsynced. An
unfinished image is 409, a failed or cancelled one 404, one whose file was removed 410.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from pydantic import BeforeValidator, Field

from jobs.errors import Conflict, NotFound
from jobs.job import ImageResult, ImageView, State
from jobs.media import MEDIA_TYPES
from jobs.recipe import recipe_of
from service.context import Context, ServiceContext
from service.http.conditional import matches, single_range, usable_range
from service.http.errors import Gone, NoPreview
from service.http.openapi import NOT_MODIFIED, Responses, binary, problems
from service.http.signed_urls import Signed, Viewer
from service.read.archive import archive
from service.read.downloads import SHEET_IMAGES, ImageFile, contact_sheet, file_name
from service.read.results import preview
from service.read.thumbnails import THUMBNAIL_TYPE, thumbnail

router = APIRouter(tags=["images"])

_FOREVER = "private, max-age=31536000, immutable"
_drawing = anyio.CapacityLimiter(2)
"""Limits how many contact sheets and thumbnails are drawn at once; each takes a core."""

_IMAGE_RESPONSES = (
    binary(*MEDIA_TYPES.values())
    | {206: {"description": "The requested range of the bytes."}}
    | NOT_MODIFIED
    | problems(404, 409, 410, 416, 422, 503)
)

_ARCHIVE_RESPONSES = (
    binary("application/zip")
    | {206: {"description": "The requested range of the bytes."}}
    | NOT_MODIFIED
    | problems(404, 409, 416, 422, 503)
)
_SHOWN_AGAIN = ("ETag", "Cache-Control")
"""Headers of the archive that a 304 repeats."""


def _canonical(text: object) -> object:
    """Refuse other ways to write an index, such as +0 or 00."""
    if isinstance(text, str) and not re.fullmatch("0|-?[1-9][0-9]*", text):
        raise ValueError("must be an integer without leading zeros")
    return text


_RECIPE: Responses = {
    200: {
        "description": "The request's fields, the model, the scheduler, library versions etc.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}

Index = Annotated[int, BeforeValidator(_canonical), PathParameter(description="From 0.")]


class SheetLayout(Signed):
    """Which thumbnails the sheet shows, and its layout."""

    page: Annotated[
        int, Field(ge=0, le=1_000_000, description=f"Which {SHEET_IMAGES} images, from 0.")
    ] = 0
    columns: Annotated[int | None, Field(ge=1, le=20, description="Default: a square.")] = None


class ThumbnailSize(Signed):
    """The thumbnail's size; there are only a few, to limit the number of stored files."""

    side: Annotated[
        Literal["64", "128", "256", "512"],
        Field(description="The longer side in pixels; a smaller image isn't enlarged."),
    ] = "256"


@router.get("/v1/jobs/{job_id}/images/{index}", response_class=Response, responses=_IMAGE_RESPONSES)
@router.head(
    "/v1/jobs/{job_id}/images/{index}",
    response_class=Response,
    responses=_IMAGE_RESPONSES,
    include_in_schema=False,
)
def get_image(
    job_id: str, index: Index, request: Request, context: Context, tenant: Viewer
) -> Response:
    """The bytes of one image. They never change: the ETag is their sha256."""
    result = _result(_image(context, tenant, job_id, index))
    headers = {
        "ETag": f'"{result.sha256}"',
        "Cache-Control": _FOREVER,
        "X-Content-Type-Options": "nosniff",
    }
    if matches(request.headers.get("if-none-match"), result.sha256):
        return Response(status_code=304, headers=headers)
    path, stat = _file(context, index, result)
    served = None
    if request.method == "GET":
        requested, if_range = request.headers.get("range"), request.headers.get("if-range")
        served = usable_range(requested, if_range, result.sha256, stat.st_size)
    return ImageFile(
        path,
        served,
        headers=headers,
        media_type=result.media_type,
        stat_result=stat,
        filename=f"{job_id}-{file_name(index, result)}",
        content_disposition_type="inline",
    )


@router.get(
    "/v1/jobs/{job_id}/images/{index}/thumbnail",
    response_class=Response,
    responses=binary(THUMBNAIL_TYPE) | NOT_MODIFIED | problems(404, 409, 410, 422, 503),
)
async def get_thumbnail(
    job_id: str,
    index: Index,
    query: Annotated[ThumbnailSize, Query()],
    request: Request,
    context: Context,
    tenant: Viewer,
) -> Response:
    """A thumbnail. It never changes: the ETag is the image's sha256 and the side."""
    image = await anyio.to_thread.run_sync(_image, context, tenant, job_id, index)
    result, side = _result(image), int(query.side)
    tag = f"{result.sha256}-{side}"
    headers = {
        "ETag": f'"{tag}"',
        "Cache-Control": _FOREVER,
        "X-Content-Type-Options": "nosniff",
    }
    if matches(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    await anyio.to_thread.run_sync(_file, context, index, result)
    data = await anyio.to_thread.run_sync(thumbnail, context.images, result, side, limiter=_drawing)
    return Response(data, media_type=THUMBNAIL_TYPE, headers=headers)


@router.get(
    "/v1/jobs/{job_id}/images/{index}/recipe",
    response_class=Response,
    responses=_RECIPE | NOT_MODIFIED | problems(404, 409, 410, 422, 503),
)
def get_recipe(
    job_id: str, index: Index, request: Request, context: Context, tenant: Viewer
) -> Response:
    """The recipe in the image's file: everything it takes to reproduce it. It never changes."""
    result = _result(_image(context, tenant, job_id, index))
    tag = f"{result.sha256}-recipe"
    headers = {"ETag": f'"{tag}"', "Cache-Control": _FOREVER}
    if matches(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    path, _ = _file(context, index, result)
    recipe = recipe_of(path)
    if recipe is None:
        raise NotFound(f"the file of image {index} has no recipe")
    return JSONResponse(recipe, headers=headers)


@router.get(
    "/v1/jobs/{job_id}/images/{index}/preview",
    response_class=Response,
    responses=binary("image/jpeg")
    | {
        204: {"description": "The image is running, but has no preview yet; see Retry-After."},
        303: {"description": "The image is finished; redirects to it."},
    }
    | problems(404, 422, 503),
)
def get_preview(job_id: str, index: Index, context: Context, tenant: Viewer) -> Response:
    """The latest preview of a running image; 204 until there's one; 303 to a finished image.

    404 if the image isn't running: it's queued, failed or cancelled.
    """
    image = _image(context, tenant, job_id, index)
    headers = {"Cache-Control": "no-store"}
    if image.result is not None:
        return RedirectResponse(context.links.image(job_id, index), 303, headers)
    data = preview(context, job_id, image)
    if data is None and image.state is State.RUNNING:
        return Response(status_code=204, headers={**headers, "Retry-After": "1"})
    if data is None:
        raise NoPreview(f"image {index} has no preview: it is {image.state}")
    return Response(data, media_type="image/jpeg", headers=headers)


@router.get("/v1/jobs/{job_id}/images.zip", response_class=Response, responses=_ARCHIVE_RESPONSES)
@router.head(
    "/v1/jobs/{job_id}/images.zip",
    response_class=Response,
    responses=_ARCHIVE_RESPONSES,
    include_in_schema=False,
)
def get_archive(job_id: str, request: Request, context: Context, tenant: Viewer) -> Response:
    """All finished images, with their recipes in `manifest.json`; 409 if there are none yet.

    Its bytes only change when another image finishes, so a download can be resumed.
    """
    job, images = context.store.job_and_images(job_id, tenant)
    files = archive(job, images, _finished_paths(context, images))
    headers = {
        "ETag": f'"{files.tag}"',
        "Cache-Control": "no-cache",
        "Accept-Ranges": "bytes",
        "Content-Length": str(files.size),
        "Content-Disposition": f'attachment; filename="{job.id}.zip"',
    }
    if matches(request.headers.get("if-none-match"), files.tag):
        return Response(status_code=304, headers={name: headers[name] for name in _SHOWN_AGAIN})
    if request.method == "HEAD":
        return Response(media_type="application/zip", headers=headers)
    requested, if_range = request.headers.get("range"), request.headers.get("if-range")
    part, status = single_range(requested, if_range, files.tag, files.size), 200
    if part is not None:
        status = 206
        headers["Content-Length"] = str(len(part))
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{files.size}"
    chunks = files.chunks(part.start, part.stop) if part else files.chunks(0, files.size)
    return StreamingResponse(chunks, status, headers=headers, media_type="application/zip")


@router.get(
    "/v1/jobs/{job_id}/sheet.png",
    response_class=Response,
    responses=binary("image/png") | NOT_MODIFIED | problems(404, 409, 422, 503),
)
async def get_sheet(
    job_id: str,
    query: Annotated[SheetLayout, Query()],
    request: Request,
    context: Context,
    tenant: Viewer,
) -> Response:
    """Thumbnails of finished images, in order; 409 if there are none yet."""

    def files_on_sheet() -> list[tuple[str, Path]]:
        """The files on the sheet, each with its sha256."""
        context.store.job(job_id, tenant)
        images = context.store.images(job_id)
        paths = _finished_paths(context, images)
        first = query.page * SHEET_IMAGES
        page = [image for image in images if image.index in paths][first : first + SHEET_IMAGES]
        if not page:
            raise NotFound(f"the job has no page {query.page} of finished images")
        return [(image.result.sha256, paths[image.index]) for image in page if image.result]

    files = await anyio.to_thread.run_sync(files_on_sheet)
    known = f"{query.columns} {' '.join(digest for digest, _ in files)}"
    tag = hashlib.sha256(known.encode()).hexdigest()
    headers = {"ETag": f'"{tag}"', "Cache-Control": "no-cache"}
    if matches(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    paths = [path for _, path in files]
    data = await anyio.to_thread.run_sync(contact_sheet, paths, query.columns, limiter=_drawing)
    return Response(data, media_type="image/png", headers=headers)


def _image(context: ServiceContext, tenant: str | None, job_id: str, index: int) -> ImageView:
    """One of the caller's images. Raises NotFound."""
    job = context.store.job(job_id, tenant)
    if not 0 <= index < job.counts.total:
        raise NotFound(f"the job has no image {index}")
    return context.store.image(job_id, index)


def _result(image: ImageView) -> ImageResult:
    """The image's result. Raises Conflict if it isn't finished, NotFound if it failed."""
    if image.result is not None:
        return image.result
    if image.state.finished:
        outcome = "failed" if image.state is State.FAILED else f"was {image.state}"
        reason = f": {image.error}" if image.error else ""
        raise NotFound(f"image {image.index} {outcome}{reason}")
    raise Conflict(f"image {image.index} is not finished yet: it is {image.state}")


def _file(context: ServiceContext, index: int, result: ImageResult) -> tuple[Path, os.stat_result]:
    """The image's file. Raises Gone."""
    path = context.images.path(result.uri)
    try:
        return path, path.stat()
    except FileNotFoundError:
        raise Gone(f"the file of image {index} has been removed") from None


def _finished_paths(context: ServiceContext, images: list[ImageView]) -> dict[int, Path]:
    """Files of the finished images by index. Raises Conflict if there are none."""
    paths = {image.index: context.images.path(image.result.uri) for image in images if image.result}
    existing = {index: path for index, path in paths.items() if path.is_file()}
    if not existing:
        raise Conflict("the job has no finished images yet")
    return existing
