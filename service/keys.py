"""API keys: `imagemill keys` creates and revokes them; only their hashes are stored.

A data folder's keys are in one file, which a running service reloads when it changes. A key has 256
random bits, so a plain SHA-256 is as secure at rest as a slow hash. Doesn't depend on HTTP.
"""

import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import structlog
from limits import parse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from jobs.errors import ConfigurationError

log = structlog.get_logger(__name__)

RECHECK_SECONDS = 1.0
"""How often the key file is checked for changes."""


def _rate(text: str) -> str:
    parse(text)
    return text


class Key(BaseModel):
    """A key and its limits. `sha256` is that of the whole key; several keys may share a tenant.

    `weight` is the tenant's share, `max_unfinished` its quota of images (None: the service's),
    `max_priority` its highest priority, `rate` a rate limit such as `600/minute` (None: unlimited).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^key_[0-9a-f]{12}$")]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: float
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    max_unfinished: Annotated[int, Field(ge=1)] | None = None
    max_priority: Annotated[int, Field(ge=0, le=9)] = 9
    rate: Annotated[str, AfterValidator(_rate)] | None = None


_KEYS = TypeAdapter(list[Key])


class KeyRing:
    """The keys in one file; no file means no keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checked = time.monotonic()
        self._seen = self._stamp()
        self._by_hash = self._read()

    def __bool__(self) -> bool:
        """Whether there are any keys, so callers need one."""
        return bool(self._current())

    def find(self, key: str) -> Key | None:
        """The record of a caller's key, if it's known."""
        return self._current().get(_digest(key))

    def all(self) -> list[Key]:
        """Every key, oldest first."""
        return sorted(self._current().values(), key=lambda key: key.created)

    def add(self, tenant: str, **allowed: object) -> tuple[str, Key]:
        """Create a key; its text is only available here. Raises ConfigurationError."""
        text = f"im_{secrets.token_urlsafe(32)}"
        try:
            key = Key.model_validate(
                {
                    "id": f"key_{secrets.token_hex(6)}",
                    "tenant": tenant,
                    "sha256": _digest(text),
                    "created": time.time(),
                    **allowed,
                }
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigurationError(f"{first['loc'][0]}: {first['msg']}") from error
        with self._changing() as keys:
            keys[key.sha256] = key
        return text, key

    def revoke(self, key_id: str) -> None:
        """Revoke a key. Raises ConfigurationError if there's no key with that id."""
        with self._changing() as keys:
            key = next((key for key in keys.values() if key.id == key_id), None)
            if key is None:
                raise ConfigurationError(f"no key {key_id}")
            del keys[key.sha256]

    def _current(self) -> Mapping[str, Key]:
        now = time.monotonic()
        if now - self._checked >= RECHECK_SECONDS:
            self._checked = now
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                try:
                    self._by_hash = self._read()
                except ConfigurationError as error:
                    log.error("couldn't read the key file; keeping the previous keys", error=error)
        return self._by_hash

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _read(self) -> dict[str, Key]:
        try:
            keys = _KEYS.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            raise ConfigurationError(f"{self._path}: {error}") from error
        return {key.sha256: key for key in keys}

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Key]]:
        """The keys, to be modified under a lock; written when the context exits."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = self._read()
            yield keys
            partial = self._path.with_name(f".keys.{secrets.token_hex(4)}")
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_KEYS.dump_json(list(keys.values()), indent=1))
                file.flush()
                os.fsync(descriptor)
            partial.replace(self._path)
            self._by_hash, self._seen = keys, self._stamp()
        finally:
            os.close(lock)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
