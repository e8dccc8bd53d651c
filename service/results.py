"""What became of a job, for routes that answer with its images: the failure, bytes, previews.

Knows images and files; knows no API's shapes.
"""

from collections.abc import Sequence

from jobs.errors import Conflict, ImagemillError, NotFound
from jobs.job import ImageView, Job, State
from service.errors import ImagesFailed
from service.mill import Mill

_PREVIEW = "{job_id}/{index}.preview.jpg"
"""Where a worker keeps the newest preview of an image that it makes (workers/delivery.py)."""


def failure(job: Job, images: Sequence[ImageView]) -> ImagemillError | None:
    """Why a finished job did not make all its images; None when it did."""
    if job.state is State.CANCELLED:
        return Conflict(f"job {job.id} was cancelled")
    if job.state is State.FAILED:
        first = next(image for image in images if image.state is State.FAILED)
        return ImagesFailed(f"image {first.index} could not be made: {first.error}")
    return None


def preview(mill: Mill, job_id: str, image: ImageView) -> bytes | None:
    """The newest preview of a running image, a JPEG, if there is one yet.

    Asking makes its worker draw more of them for a while.
    """
    if image.state is not State.RUNNING:
        return None
    mill.store.want_preview(job_id, image.index)
    uri = _PREVIEW.format(job_id=job_id, index=image.index)
    try:
        return mill.images.read(uri)
    except NotFound:
        return None
