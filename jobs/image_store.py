"""Storage for finished images: files in one folder, with a subfolder per job.

A file appears under its name only once it's complete and fsynced. The name contains the lease's
token, so two workers never write the same path. The queue decides which file counts; this module
doesn't know about the queue.
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
    """Images under `root`. A uri is `<job>/<index>.<token><suffix>`, relative to `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unavailable(self._root, error) from error

    def write(self, job_id: str, index: int, token: str, data: bytes, suffix: str) -> str:
        """Store `data` durably and return its uri; `suffix` is something like `.png`.

        A second call with the same arguments replaces the file. Raises StorageUnavailable if the
        disk is full or read-only; in that case nothing is left under the uri.
        """
        if not _SUFFIX.fullmatch(suffix):
            raise ValueError(f"invalid file suffix {suffix!r}: expected something like '.png'")
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
        """The file's path, whether or not it exists. Raises NotFound for an invalid uri."""
        job_id, _, name = uri.partition("/")
        if not (_NAME.fullmatch(job_id) and _NAME.fullmatch(name)):
            raise NotFound(f"invalid image uri {uri!r}")
        return self._root / job_id / name

    def read(self, uri: str) -> bytes:
        """The file's bytes. Raises NotFound if it's gone."""
        try:
            return self.path(uri).read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"the image file {uri} is gone") from error

    def derived(self, uri: str, name: str) -> str:
        """The uri of a file derived from an image. It's removed together with its job's files."""
        return f"{uri.partition('/')[0]}/{name}"

    def keep(self, uri: str, data: bytes) -> None:
        """Store a file that can be recreated: complete or not at all, without fsync or errors.

        Doesn't create the job's folder: if it's missing, it was removed with its job.
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
        """Remove one file, if it exists."""
        self.path(uri).unlink(missing_ok=True)

    def remove_job(self, job_id: str) -> None:
        """Remove a job's files, if it has any. Raises StorageUnavailable."""
        folder = self.path(f"{job_id}/x").parent
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unavailable(folder, error) from error


def _write_whole(path: Path, data: bytes) -> None:
    """Write `data` so that `path` is either absent, or complete and durable, even after a crash."""
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
    """Make the folder's entries durable; without this a rename may not survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unavailable(path: Path, error: OSError) -> StorageUnavailable:
    return StorageUnavailable(f"cannot store images in {path.parent}: {error.strerror or error}")
