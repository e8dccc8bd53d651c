"""Storage of OpenAI Files: the input and output files of batches.

A file consists of its bytes and a JSON document about it. Expired files are removed at the next
upload. Doesn't depend on HTTP.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from service.documents import Documents

Purpose = Literal["batch", "batch_output"]

KEEP_SECONDS = 30 * 86400
"""How long a file is kept after its upload."""

_BYTES = ".data"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of `bytes` bytes. Times are seconds since the epoch."""

    id: str
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int
    expires_at: int


class FileStore:
    """All tenants' files under `root`."""

    def __init__(self, root: Path) -> None:
        self._documents = Documents(root, "file-")

    @contextmanager
    def adding(self, tenant: str, filename: str, purpose: Purpose) -> Iterator["NewFile"]:
        """A new file to write to; it's stored when the context exits without an error."""
        self._remove_expired(tenant)
        new = NewFile(self._documents.new_id())
        with self._documents.writing(tenant, new.id, _BYTES) as target:
            new.target = target
            yield new
            size = target.tell()
        now = int(time.time())
        new.stored = StoredFile(new.id, filename, purpose, size, now, now + KEEP_SECONDS)
        self._documents.put(tenant, new.id, asdict(new.stored))

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """A file's name, size and dates. Raises NotFound."""
        return StoredFile(**self._documents.get(tenant, file_id))

    def path(self, tenant: str, file_id: str) -> Path:
        """The path of a file's bytes. Raises NotFound."""
        self.get(tenant, file_id)
        return self._documents.path(tenant, file_id, _BYTES)

    def all(self, tenant: str) -> list[StoredFile]:
        """A tenant's files, newest first."""
        return [StoredFile(**document) for document in self._documents.all(tenant)]

    def remove(self, tenant: str, file_id: str) -> None:
        """Remove a file. Raises NotFound."""
        self._documents.remove(tenant, file_id)

    def _remove_expired(self, tenant: str) -> None:
        now = time.time()
        for file in self.all(tenant):
            if file.expires_at <= now:
                self.remove(tenant, file.id)


class NewFile:
    """A file being written to `target`; `stored` is set once it's complete."""

    target: BinaryIO
    stored: StoredFile

    def __init__(self, file_id: str) -> None:
        self.id = file_id
