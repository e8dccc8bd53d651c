"""The store's connection: pools, timeouts, Lua scripts, and Redis errors turned into ours.

Every call is either a read, or a script that's safe to repeat, so a call whose reply was lost is
simply sent again. Blocking reads have their own connections. This module doesn't know about jobs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Any

import redis
import structlog
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.retry import Retry

from jobs.errors import ConfigurationError, StorageUnavailable
from jobs.queue.keys import Keys, lua_tables

log = structlog.get_logger(__name__)

OLDEST_SERVER = (7, 0)
LONGEST_BLOCK_SECONDS = 4.5
"""Blocking reads stay under five seconds, so that no proxy or timeout cuts them off."""

_RETRIES = 3
SHARED = ("prelude", "order", "halt")
"""Lua files that are prepended to every script."""


class Connection:
    """A connection to one server and one pool of keys. Thread-safe."""

    def __init__(self, url: str, pool: str, timeout: float) -> None:
        self.keys = Keys(pool)
        options: dict[str, Any] = {
            "decode_responses": True,
            "socket_connect_timeout": timeout,
            "protocol": 2,
        }
        retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), _RETRIES)
        try:
            self._client = redis.Redis.from_url(url, socket_timeout=timeout, retry=retry, **options)
            self._blocking = redis.Redis.from_url(
                url,
                socket_timeout=timeout + LONGEST_BLOCK_SECONDS,
                retry=Retry(NoBackoff(), 0),
                **options,
            )
        except ValueError as error:
            raise ConfigurationError(f"redis_url: {error}") from error

    def run(self, script: str, *args: str | int | float) -> Any:
        """Run `lua/<script>.lua` and return its raw answer. Raises StorageUnavailable."""
        text, digest = _source(script)
        with self._our_errors():
            try:
                return self._client.evalsha(digest, 1, self.keys.prefix, *args)
            except NoScriptError:
                return self._client.eval(text, 1, self.keys.prefix, *args)

    def read(self, *commands: tuple[str | int | float, ...]) -> list[Any]:
        """The answers to several read commands, all from the same moment."""
        with self._our_errors(), self._client.pipeline(transaction=True) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            return list(pipeline.execute())

    def run_and_read(
        self, script: str, args: tuple[str | int, ...], *commands: tuple[str | int | float, ...]
    ) -> list[Any]:
        """A script's answer, then those to read commands, all from the same moment."""
        text, digest = _source(script)
        call = (1, self.keys.prefix, *args)
        try:
            return self.read(("EVALSHA", digest, *call), *commands)
        except NoScriptError:
            return self.read(("EVAL", text, *call), *commands)

    def ask(self, call: Callable[["redis.Redis"], Any]) -> Any:
        """Send a command that's safe to repeat."""
        with self._our_errors():
            return call(self._client)

    def block(self, call: Callable[["redis.Redis"], Any]) -> Any:
        """Send a blocking read, without repeating it."""
        with self._our_errors():
            return call(self._blocking)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        self._blocking.close()

    def check_server(self) -> None:
        """Refuse a server that's too old, and warn about settings that can lose jobs."""
        info: dict[str, Any] = self.ask(lambda client: client.info())
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
            raise ConfigurationError(
                f"the queue server is version {version}; 7.0 or later is required"
            )
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            log.warning(
                "the queue server may evict jobs; set maxmemory-policy to noeviction",
                maxmemory_policy=policy,
            )
        # While a server loads its data, it reports the file as off.
        if not info.get("aof_enabled") and not info.get("loading"):
            log.warning("the queue server's append-only file is off; a crash may lose jobs")

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        """Raise StorageUnavailable if waiting may help, ConfigurationError if it won't."""
        try:
            yield
        except AuthenticationError as error:
            raise ConfigurationError(f"the queue server refused the login: {error}") from error
        except (RedisError, OSError) as error:
            message = _transient_message(error)
            if message is None:
                raise
            if isinstance(error, ReadOnlyError):
                self._drop_idle()
            raise StorageUnavailable(message) from error

    def _drop_idle(self) -> None:
        """Close the pools' idle connections, so that the next call resolves the address again.

        After a failover, a proxy may keep connections to the demoted server open for as long as we
        do. Connections in use get here at their own next refusal.
        """
        for client in (self._client, self._blocking):
            client.connection_pool.disconnect(inuse_connections=False)


@cache
def _source(script: str) -> tuple[str, str]:
    """A script's full text, and the SHA-1 that identifies it on the server."""
    folder = files("jobs.queue") / "lua"
    parts = [(folder / f"{name}.lua").read_text(encoding="utf-8") for name in (*SHARED, script)]
    text = "\n".join([lua_tables(), *parts])
    return text, sha1(text.encode(), usedforsecurity=False).hexdigest()


_LOADING = "the queue server is starting and still loading its data"
_CLUSTER = "the queue server's cluster is down or moving keys"
# redis-py has exception classes for some error codes; the other codes are only in the message.
_BY_CLASS: dict[type[Exception], str] = {
    BusyLoadingError: _LOADING,
    OutOfMemoryError: "the queue server is out of memory",
    ReadOnlyError: "the queue server is a read-only replica",
    MasterDownError: "the queue server has lost its primary",
    ClusterDownError: _CLUSTER,
    TryAgainError: _CLUSTER,
    AskError: "the queue server's cluster keeps this pool on another node",  # also MovedError
    redis.TimeoutError: "the queue server did not answer in time",
    TimeoutError: "the queue server did not answer in time",
}
_BY_CODE = {
    "MISCONF": "the queue server cannot write to its disk; is it full?",
    "NOREPLICAS": "the queue server lacks the replicas that it needs for writes",
    "BUSY": "the queue server is busy with a script",
    "UNBLOCKED": "the queue server has become a replica",
}
_IN_PIPELINE = " of pipeline caused error: "
"""The text that redis-py puts between a pipeline's failed command and its error."""


def _transient_message(error: Exception) -> str | None:
    """The message for an error that may go away by itself; None for others."""
    for kind, message in _BY_CLASS.items():
        if isinstance(error, kind):
            return message
    if isinstance(error, redis.ConnectionError | OSError):
        return f"the queue server cannot be reached: {error}"
    answer = str(error).rpartition(_IN_PIPELINE)[2]
    return _BY_CODE.get(answer.partition(" ")[0])
