"""Failover: a primary is demoted, and its address now leads to the new one."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingUnixStreamServer
from urllib.parse import unquote

import pytest
import redis

from jobs.errors import StorageUnavailable
from jobs.queue.store import Store
from jobs.reports import WorkerReport
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.waiting import wait_until

IDLE = 3
"""Idle connections in the pool when the primary is demoted."""


class Proxy(ThreadingUnixStreamServer):
    """Connects new clients to `target`, and leaves existing connections alone."""

    daemon_threads = True
    target: EmbeddedServer


class Pump(StreamRequestHandler):
    """Forwards both directions of a connection, until either end closes it."""

    server: Proxy

    def handle(self) -> None:
        """Forward bytes in both directions."""
        with socket.socket(socket.AF_UNIX) as there, selectors.DefaultSelector() as ready:
            there.connect(unquote(self.server.target.url.removeprefix("unix://")))
            ready.register(self.connection, selectors.EVENT_READ, there)
            ready.register(there, selectors.EVENT_READ, self.connection)
            with suppress(OSError):
                while all(self._carry(key.fileobj, key.data) for key, _ in ready.select()):
                    continue

    def _carry(self, source: socket.socket, sink: socket.socket) -> bool:
        data = source.recv(65536)
        sink.sendall(data)
        return bool(data)


@contextmanager
def serving(path: Path) -> Iterator[Proxy]:
    with Proxy(str(path), Pump) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()


def demote(server: EmbeddedServer) -> None:
    """Make the server a replica. Its primary doesn't exist, but it refuses writes anyway."""
    with redis.Redis.from_url(server.url) as client:
        client.replicaof("127.0.0.1", 1)


def fill(pool: "redis.ConnectionPool") -> None:
    """Leave several connections idle in the pool."""
    connections = [pool.get_connection() for _ in range(IDLE)]
    for connection in connections:
        pool.release(connection)


@pytest.mark.parametrize("refused", ["a move", "a wait"])
def test_one_refusal_is_enough_to_find_the_new_primary(tmp_path: Path, refused: str) -> None:
    with ExitStack() as stack:
        old, new = (
            stack.enter_context(EmbeddedServer.ensure(tmp_path / name)) for name in ("a", "b")
        )
        address = stack.enter_context(serving(tmp_path / "proxy.sock"))
        address.target = old
        store = Store.connect(f"unix://{tmp_path}/proxy.sock")
        stack.callback(store.close)
        fill(store._connection._client.connection_pool)
        fill(store._connection._blocking.connection_pool)
        calls = {
            "a move": lambda: store.register("w1", WorkerReport("demo"), 60),
            "a wait": lambda: store.wait("demo", 0.01),
        }

        demote(old)
        address.target = new
        with pytest.raises(StorageUnavailable, match="is a read-only replica"):
            calls[refused]()
        for call in (*calls.values(), *calls.values()):
            call()
        assert [worker.id for worker in store.workers()] == ["w1"]


def test_a_wait_cut_short_by_a_demotion_is_storage_unavailable(tmp_path: Path) -> None:
    with EmbeddedServer.ensure(tmp_path) as server:
        store = Store.connect(server.url)
        outcome: list[BaseException] = []

        def wait() -> None:
            try:
                while True:
                    store.wait("demo", 4)
            except BaseException as error:
                outcome.append(error)

        with redis.Redis.from_url(server.url) as client:
            thread = threading.Thread(target=wait)
            thread.start()
            wait_until(lambda: client.info("clients")["blocked_clients"])
            client.replicaof("127.0.0.1", 1)
            thread.join()
        assert [type(error) for error in outcome] == [StorageUnavailable]
        assert "replica" in str(outcome[0])
        store.close()
