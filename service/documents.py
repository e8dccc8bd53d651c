"""Small JSON documents on disk, one folder a tenant, each replaced whole or not at all.

What Files, Batches and webhooks must remember lives beside the images, not in the queue: it is
little, and it outlives the jobs. Knows nothing of what the documents say.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from jobs.errors import NotFound, StorageUnavailable

_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")


class Documents:
    """Documents under `root`, whose ids begin with `prefix`."""

    def __init__(self, root: Path, prefix: str) -> None:
        self._root = root
        self._prefix = prefix

    def new_id(self) -> str:
        """An id that nobody has."""
        return f"{self._prefix}{secrets.token_hex(12)}"

    def put(self, tenant: str, document_id: str, document: dict[str, Any]) -> None:
        """Write or replace a document. Raises StorageUnavailable."""
        with self.writing(tenant, document_id, ".json") as file:
            file.write(json.dumps(document).encode())

    def get(self, tenant: str, document_id: str) -> dict[str, Any]:
        """A document. Raises NotFound."""
        try:
            text = self.path(tenant, document_id, ".json").read_bytes()
        except FileNotFoundError:
            raise NotFound(f"no {self._prefix.rstrip('-_')} {document_id}") from None
        found: dict[str, Any] = json.loads(text)
        return found

    def all(self, tenant: str) -> list[dict[str, Any]]:
        """A tenant's documents, newest first by their `created_at`."""
        folder = self._folder(tenant)
        names = [path.stem for path in folder.glob(f"{self._prefix}*.json")]
        found = []
        for name in names:
            try:
                found.append(self.get(tenant, name))
            except NotFound:  # removed since the folder was listed
                continue
        return sorted(found, key=lambda one: (one["created_at"], one["id"]), reverse=True)

    def remove(self, tenant: str, document_id: str) -> None:
        """Remove a document and what lies beside it. Raises NotFound."""
        self.get(tenant, document_id)
        for path in self._folder(tenant).glob(f"{document_id}.*"):
            path.unlink(missing_ok=True)

    def path(self, tenant: str, document_id: str, suffix: str) -> Path:
        """Where a document, or what belongs to it, is or would be. Raises NotFound."""
        if not (_NAME.fullmatch(document_id) and document_id.startswith(self._prefix)):
            raise NotFound(f"no {self._prefix.rstrip('-_')} {document_id[:80]!r}")
        return self._folder(tenant) / f"{document_id}{suffix}"

    @contextmanager
    def writing(self, tenant: str, document_id: str, suffix: str) -> Iterator[BinaryIO]:
        """A file that takes its name, durably, when the context ends without an error."""
        path = self.path(tenant, document_id, suffix)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise StorageUnavailable(f"cannot write in {path.parent}: {reason}") from error

    def _folder(self, tenant: str) -> Path:
        if not _NAME.fullmatch(tenant):
            raise NotFound(f"no tenant {tenant!r}")
        return self._root / tenant
