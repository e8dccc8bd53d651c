"""A ZIP of a job's finished images: streamed, and the same bytes each time, so that it's resumable.

Entries are stored uncompressed with a fixed date, so the length is known in advance. Works on image
views and paths; doesn't depend on the store or tenants.
"""

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

from jobs.fields import PER_IMAGE
from jobs.job import ImageView, Job
from jobs.recipe import recipe_of
from service.read.downloads import file_name

_CHUNK = 2**18
_LAYOUT = 1
"""Part of the tag; to be changed whenever the same images would give other bytes."""

# Bytes of the format's parts (APPNOTE.TXT), besides names and contents.
_HEADER, _DESCRIPTOR, _CENTRAL, _FAR, _END, _END_64 = 30, 16, 46, 12, 22, 76


@dataclass(frozen=True, slots=True)
class Archive:
    """The archive to be streamed. `size` is in bytes; `tag` identifies its bytes.

    `files` are the images by their name in the archive.
    """

    manifest: bytes
    files: tuple[tuple[str, Path], ...]
    date: tuple[int, int, int, int, int, int]
    size: int
    tag: str

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop` (excluded), in pieces.

        Files before `start` are read too, because the archive ends with everyone's checksum.
        """
        place = 0
        for piece in self._pieces():
            if place >= stop:
                return
            wanted = piece[max(0, start - place) : stop - place]
            place += len(piece)
            if wanted:
                yield wanted

    def _pieces(self) -> Iterator[bytes]:
        pipe = _Pipe()
        with ZipFile(pipe, "w") as target:
            target.writestr(ZipInfo("manifest.json", self.date), self.manifest)
            yield pipe.take()
            for name, path in self.files:
                with path.open("rb") as file, target.open(ZipInfo(name, self.date), "w") as entry:
                    while chunk := file.read(_CHUNK):
                        entry.write(chunk)
                        yield pipe.take()
        yield pipe.take()


class _Pipe(io.RawIOBase):
    """What was written since the last `take`. Can't seek, so sizes follow an entry's bytes."""

    def __init__(self) -> None:
        super().__init__()
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._written += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._written)
        self._written.clear()
        return taken


def archive(job: Job, images: Sequence[ImageView], paths: dict[int, Path]) -> Archive:
    """The images in `paths`, each smaller than 2 GiB, and a `manifest.json` of all images."""
    manifest = json.dumps(_manifest(job, images, paths), indent=1).encode()
    files = tuple(
        (file_name(image.index, image.result), paths[image.index])
        for image in images
        if image.index in paths and image.result
    )
    sizes = [(name, path.stat().st_size) for name, path in files]
    return Archive(
        manifest=manifest,
        files=files,
        date=time.gmtime(job.created)[:6],
        size=_length([("manifest.json", len(manifest)), *sizes]),
        # The manifest has the digest of every file.
        tag=hashlib.sha256(b"%d %b" % (_LAYOUT, manifest)).hexdigest(),
    )


def _length(entries: Sequence[tuple[str, int]]) -> int:
    """The length of an archive of these names and sizes, as `zipfile` streams it."""
    place, directory = 0, 0
    for name, size in entries:
        is_far = place > zipfile.ZIP64_LIMIT
        directory += _CENTRAL + len(name) + (_FAR if is_far else 0)
        place += _HEADER + len(name) + size + _DESCRIPTOR
    is_large = (
        len(entries) > zipfile.ZIP_FILECOUNT_LIMIT
        or place > zipfile.ZIP64_LIMIT
        or directory > zipfile.ZIP64_LIMIT
    )
    return place + directory + _END + (_END_64 if is_large else 0)


def _manifest(job: Job, images: Sequence[ImageView], paths: dict[int, Path]) -> dict[str, Any]:
    return {
        "job": job.id,
        "model": job.model,
        "state": job.state,
        "created": job.created,
        "metadata": job.metadata,
        "images": [_manifest_entry(image, paths.get(image.index)) for image in images],
    }


def _manifest_entry(image: ImageView, path: Path | None) -> dict[str, Any]:
    request, result = image.request, image.result
    return {
        "index": image.index,
        "file": file_name(image.index, result) if path and result else None,
        "state": image.state,
        **{name: getattr(request, name) for name in PER_IMAGE},
        "sha256": result.sha256 if result else None,
        "error": image.error,
        "warnings": list(result.warnings) if result else [],
        "recipe": recipe_of(path) if path else None,
    }
