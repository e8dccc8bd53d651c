"""What became of a job, for routes that answer with its images: the failure, bytes, previews.

Knows images and files; knows no API's shapes.
"""

from collections.abc import Sequence

from jobs.errors import Conflict, ImagemillError, NotFound
from jobs.job import ImageView, State
from service.context import ServiceContext
from service.http.errors import ImagesFailed

_PREVIEW = "{job_id}/{index}.preview.jpg"
"""Where a worker keeps the newest preview of an image that it makes (workers/delivery.py)."""


def is_over(images: Sequence[ImageView]) -> bool:
    """Whether nothing more will happen to these images."""
    return all(image.state.finished for image in images)


def failure(images: Sequence[ImageView]) -> ImagemillError | None:
    """Why not all of a job's images were made; None when they were.

    Somebody may have had a finished job run again in the meantime: that is a conflict.
    """
    failed = next((image for image in images if image.state is State.FAILED), None)
    if failed is not None:
        return ImagesFailed(f"image {failed.index} could not be made: {failed.error}")
    if any(image.result is None for image in images):
        return Conflict("the job was cancelled, or runs again")
    return None


def preview(context: ServiceContext, job_id: str, image: ImageView) -> bytes | None:
    """The newest preview of a running image, a JPEG, if there is one yet.

    Asking makes its worker draw more of them for a while.
    """
    if image.state is not State.RUNNING:
        return None
    context.store.want_preview(job_id, image.index)
    uri = _PREVIEW.format(job_id=job_id, index=image.index)
    try:
        return context.images.read(uri)
    except NotFound:
        return None
