"""Downloads of finished images: single files and contact sheets.

Works on results and paths; doesn't depend on the store or tenants.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from jobs.job import ImageResult
from jobs.media import SUFFIXES
from jobs.sheet import Grid, fitted

SHEET_IMAGES = 100
"""Maximum number of thumbnails per sheet."""

THUMBNAIL = 160
"""Longer side of a sheet's thumbnails, in pixels."""

_GAP = 8


class ImageFile(FileResponse):
    """A file response whose Range header is replaced by `served`, or removed if that's None."""

    def __init__(self, path: Path, served: str | None, **kwargs: Any) -> None:
        super().__init__(path, **kwargs)
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or the `served` range of it."""
        headers = [pair for pair in scope["headers"] if pair[0] not in (b"range", b"if-range")]
        if self._served is not None:
            headers.append((b"range", self._served.encode("ascii")))
        await super().__call__({**scope, "headers": headers}, receive, send)


def file_name(index: int, result: ImageResult) -> str:
    """An image's file name in archives and downloads."""
    return f"{index:05d}{SUFFIXES.get(result.media_type, '.bin')}"


def contact_sheet(paths: Sequence[Path], columns: int | None = None) -> bytes:
    """A PNG of the files' thumbnails, row by row; at most SHEET_IMAGES of them."""
    grid = Grid(
        count=len(paths),
        columns=columns or math.ceil(math.sqrt(len(paths))),
        width=THUMBNAIL,
        height=THUMBNAIL,
        gap=_GAP,
    )
    sheet = grid.blank()
    for position, path in enumerate(paths[:SHEET_IMAGES]):
        thumbnail, (left, top) = fitted(path, THUMBNAIL), grid.place(position)
        shift = ((THUMBNAIL - thumbnail.width) // 2, (THUMBNAIL - thumbnail.height) // 2)
        sheet.paste(thumbnail, (left + shift[0], top + shift[1]))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
