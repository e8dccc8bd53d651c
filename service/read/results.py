"""A job's outcome, for routes that respond with its images: its failure, previews.

Works on images and files; doesn't know any API's format.
"""

from collections.abc import Sequence

from jobs.errors import Conflict, ImagemillError, NotFound
from jobs.job import ImageView, State
from service.context import ServiceContext
from service.http.errors import ImagesFailed

_PREVIEW = "{job_id}/{index}.preview.jpg"
"""Where a worker stores the latest preview of a running image (workers/delivery.py)."""


def is_over(images: Sequence[ImageView]) -> bool:
    """Whether all of these images are finished."""
    return all(image.state.finished for image in images)


def failure(images: Sequence[ImageView]) -> ImagemillError | None:
    """Why a finished job doesn't have all its images; None if it does.

    A job that another request has retried in the meantime is a conflict.
    """
    failed = next((image for image in images if image.state is State.FAILED), None)
    if failed is not None:
        return ImagesFailed(f"image {failed.index} failed: {failed.error}")
    if any(image.result is None for image in images):
        return Conflict("the job was cancelled or retried")
    return None


def preview(context: ServiceContext, job_id: str, image: ImageView) -> bytes | None:
    """The latest preview of a running image as a JPEG, if there's one yet.

    Calling this makes the worker draw more previews for a while.
    """
    if image.state is not State.RUNNING:
        return None
    context.store.want_preview(job_id, image.index)
    uri = _PREVIEW.format(job_id=job_id, index=image.index)
    try:
        return context.images.read(uri)
    except NotFound:
        return None
