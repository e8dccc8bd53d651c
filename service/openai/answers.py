"""Finished images in the format of OpenAI's Images API."""

import base64
import time
from collections.abc import Sequence
from typing import Literal

from jobs.image_store import LocalImages
from jobs.job import ImageView
from service.openai.schemas import GeneratedImage, GeneratedImages
from service.openai.usage import Usage
from service.read.views import Links

Form = Literal["b64_json", "url"]


def generated(
    files: LocalImages,
    links: Links,
    job_id: str,
    images: Sequence[ImageView],
    form: Form | None,
    used: Usage | None = None,
) -> GeneratedImages:
    """The response with `images`, which must all be finished; in both formats if `form` is None.

    Raises NotFound if a file has been removed.
    """
    request = images[0].request
    return GeneratedImages(
        created=int(time.time()),
        data=[_image(files, links, job_id, image, form) for image in images],
        size=f"{request.width}x{request.height}",
        output_format=request.format,
        usage=used,
        job=job_id,
    )


def _image(
    files: LocalImages, links: Links, job_id: str, image: ImageView, form: Form | None
) -> GeneratedImage:
    encoded = None
    if form != "url" and image.result is not None:
        encoded = base64.b64encode(files.read(image.result.uri)).decode("ascii")
    return GeneratedImage(
        b64_json=encoded,
        url=links.image(job_id, image.index) if form != "b64_json" else None,
        seed=image.request.seed,
        index=image.index,
    )
