"""What became of a job, for routes that answer with its images: the failure, bytes, previews.

Knows images and files; knows no API's shapes.
"""

from collections.abc import Sequence

from jobs.errors import Conflict, ImagemillError
from jobs.images import LocalImages
from jobs.job import ImageView, Job, State
from service.errors import ImagesFailed

_PREVIEW = "{job_id}/{index}.preview.jpg"
"""Where a worker keeps the latest preview of an image that it makes."""


def failure(job: Job, images: Sequence[ImageView]) -> ImagemillError | None:
    """Why a finished job did not make all its images; None when it did."""
    if job.state is State.CANCELLED:
        return Conflict(f"job {job.id} was cancelled")
    if job.state is State.FAILED:
        first = next(image for image in images if image.state is State.FAILED)
        return ImagesFailed(f"image {first.index} could not be made: {first.error}")
    return None


def preview(images: LocalImages, job_id: str, index: int) -> bytes | None:
    """The latest preview of an image, a JPEG, if a worker has left one."""
    try:
        return images.path(_PREVIEW.format(job_id=job_id, index=index)).read_bytes()
    except FileNotFoundError:
        return None
