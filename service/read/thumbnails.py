"""Thumbnails for galleries: created on first use and stored next to the image.

A thumbnail can be recreated, so it isn't fsynced. It's removed together with the job's files. Works
on an image's result; doesn't depend on any route or on the store.
"""

import io

from PIL import Image

from jobs.errors import NotFound
from jobs.image_store import LocalImages
from jobs.job import ImageResult
from jobs.sheet import shrunk

THUMBNAIL_TYPE = "image/jpeg"
_QUALITY = 82


def thumbnail(images: LocalImages, result: ImageResult, side: int) -> bytes:
    """A JPEG whose longer side is at most `side` pixels. Raises NotFound if the image has no file.

    Its name includes the image's digest, so a retried image gets a new thumbnail.
    """
    uri = images.derived(result.uri, f"thumbnail-{result.sha256[:16]}-{side}.jpg")
    try:
        return images.read(uri)
    except NotFound:
        data = _shrunk(images.read(result.uri), side)
    images.keep(uri, data)
    return data


def _shrunk(data: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(data)) as picture:
        small = shrunk(picture, side)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
