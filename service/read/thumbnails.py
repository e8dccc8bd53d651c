"""Images made small for galleries: drawn at first use, kept beside the image, read after that.

What is kept can be made again, so it is not fsynced, and goes when the job's files go. Works from
an image's result; knows no route and no store.
"""

import io

from PIL import Image

from jobs.errors import NotFound
from jobs.image_store import LocalImages
from jobs.job import ImageResult

THUMBNAIL_TYPE = "image/jpeg"
_QUALITY = 82


def thumbnail(images: LocalImages, result: ImageResult, side: int) -> bytes:
    """A JPEG whose longer side is at most `side` pixels. Raises NotFound without the image's file.

    The image's digest is in the name of what is kept: other bytes are another thumbnail.
    """
    kept = images.beside(result.uri, f"thumbnail-{result.sha256[:16]}-{side}.jpg")
    try:
        return images.read(kept)
    except NotFound:
        data = _drawn(images.read(result.uri), side)
    images.keep(kept, data)
    return data


def _drawn(data: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft("RGB", (side, side))  # a JPEG is decoded small at once
        small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
