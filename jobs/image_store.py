"""Where finished images' bytes live: files in one folder, a subfolder a job.

A file appears under its name only whole and fsynced, and its name holds the lease's token, so two
workers never write the same path. Which of them counts is the store's business: this module knows
nothing of the queue.
"""

import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from jobs.errors import NotFound, StorageUnavailable

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SUFFIX = re.compile(r"\.[a-z0-9]+")


class LocalImages:
    """Images under `root`. A uri is `<job>/<index>.<token><suffix>`, relative to it."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unavailable(self._root, error) from error

    def write(self, job_id: str, index: int, token: str, data: bytes, suffix: str) -> str:
        """Store `data` durably and return its uri; `suffix` is such as `.png`.

        The same arguments again replace the file. Raises StorageUnavailable when the disk
        refuses (full, read-only); nothing is then left under the uri.
        """
        if not _SUFFIX.fullmatch(suffix):
            raise ValueError(f"{suffix!r} is no file suffix such as '.png'")
        uri = f"{job_id}/{index}.{token}{suffix}"
        path = self.path(uri)
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(exist_ok=True)
                _sync_folder(self._root)
            _write_whole(path, data)
        except OSError as error:
            raise _unavailable(path, error) from error
        return uri

    def path(self, uri: str) -> Path:
        """The file's path, whether or not it exists. Raises NotFound for a uri not made here."""
        job_id, _, name = uri.partition("/")
        if not (_NAME.fullmatch(job_id) and _NAME.fullmatch(name)):
            raise NotFound(f"{uri!r} is no image uri")
        return self._root / job_id / name

    def read(self, uri: str) -> bytes:
        """The file's bytes. Raises NotFound when it is gone."""
        try:
            return self.path(uri).read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"the image file {uri} is gone") from error

    def beside(self, uri: str, name: str) -> str:
        """The uri of something made from an image, which goes when its job's files go."""
        return f"{uri.partition('/')[0]}/{name}"

    def keep(self, uri: str, data: bytes) -> None:
        """Store what can be made again, whole but not durably; not at all if the disk refuses.

        Never makes a job's folder: one that is gone was removed with its job.
        """
        path = self.path(uri)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def remove(self, uri: str) -> None:
        """Remove one file; one that is gone already is fine."""
        self.path(uri).unlink(missing_ok=True)

    def remove_job(self, job_id: str) -> None:
        """Remove all files of a job; a job without files is fine. Raises StorageUnavailable."""
        folder = self.path(f"{job_id}/x").parent
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unavailable(folder, error) from error

    def orphans(self, job_id: str, committed: set[str]) -> list[str]:
        """Uris of a job's files that are not `committed`, half-written ones included.

        Meant for a finished job: while one runs, an image just written and about to be committed
        looks the same as one whose commit was refused.
        """
        folder = self.path(f"{job_id}/x").parent
        if not folder.is_dir():
            return []
        uris = (f"{job_id}/{path.name}" for path in sorted(folder.iterdir()))
        return [uri for uri in uris if uri not in committed]


def _write_whole(path: Path, data: bytes) -> None:
    """Write so that `path` is absent or whole and durable, whatever happens in between."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries durable: a rename is safe only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unavailable(path: Path, error: OSError) -> StorageUnavailable:
    return StorageUnavailable(f"cannot store images in {path.parent}: {error.strerror or error}")
