"""Small JSON documents on disk, in one folder per tenant, written atomically.

The state of Files, Batches and webhooks is stored next to the images rather than in the queue,
because it's small and outlives the jobs. Doesn't know the documents' content.
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
    """Documents under `root`, with ids that start with `prefix`."""

    def __init__(self, root: Path, prefix: str) -> None:
        self._root = root
        self._prefix = prefix

    def new_id(self) -> str:
        """A new random id."""
        return f"{self._prefix}{secrets.token_hex(12)}"

    def put(self, tenant: str, document_id: str, document: dict[str, Any]) -> None:
        """Write or replace a document. Raises StorageUnavailable."""
        with self.writing(tenant, document_id, ".json") as file:
            file.write(json.dumps(document).encode())

    def create(self, tenant: str, document_id: str, document: dict[str, Any]) -> bool:
        """Write a document unless there's one with this id; whether it was written.

        Raises StorageUnavailable.
        """
        path = self.path(tenant, document_id, ".json")
        draft = f".{secrets.token_hex(4)}.draft"
        with self.writing(tenant, document_id, draft) as file:
            file.write(json.dumps(document).encode())
        complete = self.path(tenant, document_id, draft)
        try:
            os.link(complete, path)
        except FileExistsError:
            return False
        finally:
            complete.unlink(missing_ok=True)
        return True

    def get(self, tenant: str, document_id: str) -> dict[str, Any]:
        """A document. Raises NotFound."""
        try:
            text = self.path(tenant, document_id, ".json").read_bytes()
        except FileNotFoundError:
            raise NotFound(f"no {self._prefix.rstrip('-_')} {document_id}") from None
        document: dict[str, Any] = json.loads(text)
        return document

    def all(self, tenant: str) -> list[dict[str, Any]]:
        """A tenant's documents, newest first by their `created_at`."""
        folder = self._folder(tenant)
        names = [path.stem for path in folder.glob(f"{self._prefix}*.json")]
        documents = []
        for name in names:
            try:
                documents.append(self.get(tenant, name))
            except NotFound:  # removed since the folder was listed
                continue
        return sorted(
            documents,
            key=lambda document: (document["created_at"], document["id"]),
            reverse=True,
        )

    def remove(self, tenant: str, document_id: str) -> None:
        """Remove a document and its other files. Raises NotFound."""
        self.get(tenant, document_id)
        for path in self._folder(tenant).glob(f"{document_id}.*"):
            path.unlink(missing_ok=True)

    def path(self, tenant: str, document_id: str, suffix: str) -> Path:
        """The path of a document or one of its other files, by suffix. Raises NotFound."""
        if not (_NAME.fullmatch(document_id) and document_id.startswith(self._prefix)):
            raise NotFound(f"no {self._prefix.rstrip('-_')} {document_id[:80]!r}")
        return self._folder(tenant) / f"{document_id}{suffix}"

    @contextmanager
    def writing(self, tenant: str, document_id: str, suffix: str) -> Iterator[BinaryIO]:
        """A file that atomically gets its name when the context exits without an error."""
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
