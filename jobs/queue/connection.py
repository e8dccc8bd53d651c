"""The store's connection: pools, timeouts, Lua scripts, and Redis errors as one of ours.

Every call is either a script, which is safe to repeat, or a read; so a call whose reply was lost
is simply repeated. Blocking reads have connections of their own. Knows nothing of jobs.
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
"""A blocking read is shorter than five seconds, so that no proxy or time-out cuts it."""

_RETRIES = 3
_SHARED = ("prelude", "order", "halt")
"""Lua files that every script begins with."""


class Link:
    """One server and one pool of keys, for any number of threads."""

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
        """Run `lua/<script>.lua`; its answer as it comes. Raises StorageUnavailable."""
        text, digest = _source(script)
        with self._our_errors():
            try:
                return self._client.evalsha(digest, 1, self.keys.prefix, *args)
            except NoScriptError:
                return self._client.eval(text, 1, self.keys.prefix, *args)

    def read(self, *commands: tuple[str | int | float, ...]) -> list[Any]:
        """The answers to several read commands, all of the same moment."""
        with self._our_errors(), self._client.pipeline(transaction=True) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            return list(pipeline.execute())

    def run_and_read(
        self, script: str, args: tuple[str | int, ...], *commands: tuple[str | int | float, ...]
    ) -> list[Any]:
        """A script's answer and then those to read commands, all of the same moment."""
        text, digest = _source(script)
        call = (1, self.keys.prefix, *args)
        try:
            return self.read(("EVALSHA", digest, *call), *commands)
        except NoScriptError:
            return self.read(("EVAL", text, *call), *commands)

    def ask(self, call: Callable[["redis.Redis"], Any]) -> Any:
        """One command that is safe to repeat."""
        with self._our_errors():
            return call(self._client)

    def block(self, call: Callable[["redis.Redis"], Any]) -> Any:
        """One blocking read, not repeated."""
        with self._our_errors():
            return call(self._blocking)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()
        self._blocking.close()

    def check_server(self) -> None:
        """Refuse a server that is too old; warn of settings under which jobs can get lost."""
        found: dict[str, Any] = self.ask(lambda client: client.info())
        version = str(found.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
            raise ConfigurationError(f"the queue server is version {version}; 7.0 is the oldest")
        policy = found.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            log.warning("the queue server may evict jobs; set noeviction", maxmemory_policy=policy)
        # While it loads its data, a server says that the file is off.
        if not found.get("aof_enabled") and not found.get("loading"):
            log.warning("the queue server's append-only file is off; its death may lose jobs")

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        """Raise StorageUnavailable for what time may heal, ConfigurationError for what it won't."""
        try:
            yield
        except AuthenticationError as error:
            raise ConfigurationError(f"the queue server refuses us: {error}") from error
        except (RedisError, OSError) as error:
            sentence = _sentence(error)
            if sentence is None:
                raise
            if isinstance(error, ReadOnlyError):
                self._hang_up()
            raise StorageUnavailable(sentence) from error

    def _hang_up(self) -> None:
        """Close what is idle in the pools, so that the next call looks the address up anew.

        After a failover a proxy may hold the connections to the server that was demoted for as
        long as we do. Those in use close so at their own next refusal.
        """
        for client in (self._client, self._blocking):
            client.connection_pool.disconnect(inuse_connections=False)


@cache
def _source(script: str) -> tuple[str, str]:
    """A script's whole text, and its SHA-1, by which the server knows it."""
    folder = files("jobs.queue") / "lua"
    parts = [(folder / f"{name}.lua").read_text(encoding="utf-8") for name in (*_SHARED, script)]
    text = "\n".join([lua_tables(), *parts])
    return text, sha1(text.encode(), usedforsecurity=False).hexdigest()


_LOADING = "the queue server is starting and still loads its data"
_CLUSTER = "the queue server's cluster is down or moving keys"
# redis-py makes classes of some of the server's error codes, and leaves others in the text.
_BY_CLASS: dict[type[Exception], str] = {
    BusyLoadingError: _LOADING,
    OutOfMemoryError: "the queue server is out of memory",
    ReadOnlyError: "the queue server is a replica and takes no writes",
    MasterDownError: "the queue server has lost its primary",
    ClusterDownError: _CLUSTER,
    TryAgainError: _CLUSTER,
    AskError: "the queue server's cluster keeps this pool on another node",  # MovedError is one
    redis.TimeoutError: "the queue server does not answer in time",
    TimeoutError: "the queue server does not answer in time",
}
_BY_CODE = {
    "MISCONF": "the queue server cannot write to its disk; is it full?",
    "NOREPLICAS": "the queue server misses the replicas that it needs for a write",
    "BUSY": "the queue server is busy with a script",
    "UNBLOCKED": "the queue server has become a replica",
}
_IN_PIPELINE = " of pipeline caused error: "
"""What redis-py writes, after the command, before the error of a command in a pipeline."""


def _sentence(error: Exception) -> str | None:
    """What to tell of an error that time may heal; None for any other."""
    for kind, sentence in _BY_CLASS.items():
        if isinstance(error, kind):
            return sentence
    if isinstance(error, redis.ConnectionError | OSError):
        return f"the queue server cannot be reached: {error}"
    answer = str(error).rpartition(_IN_PIPELINE)[2]
    return _BY_CODE.get(answer.partition(" ")[0])
