"""The service's rate over HTTP: one-prompt jobs submitted per second, and jobs polled per second.

There's a real service process with the embedded queue server, and this process as the caller. It
uses a few persistent connections and a minimal HTTP client, so that the client isn't what's
measured. Rates are measured with every connection sending as soon as it's answered, next to a
worker that denoises without a pause. Latencies are measured with the worker idle, at the target
rates.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import serving
from bench.report import Metrics
from imagemill.client.clients import Client

CATALOG = Path("models.toml")
MODELS = """
[models.demo]
path = "{path}"
dtype = "float32"
workers = 1
defaults = {{ width = 128, height = 128, steps = 8, guidance_scale = 2.5 }}

[models.parked]
path = "{path}"
dtype = "float32"
defaults = {{ width = 128, height = 128, steps = 8, guidance_scale = 2.5 }}
"""
CONNECTIONS = 8
SECONDS, WARM_UP_SECONDS = 8.0, 2.0
WANTED_SUBMITS, WANTED_POLLS = 200.0, 500.0
"""Requests per second at which latencies are measured."""

Request = Callable[[], bytes]


@dataclass
class Load:
    """The results of a load: the seconds of each response, and of the whole load."""

    seconds: list[float] = field(default_factory=list)
    took: float = 0.0

    @property
    def rate(self) -> float:
        """Responses per second."""
        return len(self.seconds) / self.took

    def quantile(self, share: float) -> float:
        """The milliseconds within which this share of the responses arrived."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run(seconds: float = SECONDS) -> Metrics:
    """Measure both rates and both latencies."""
    with _up() as (host, client):
        submit, poll = _submission(host), _poll(host, client.submit("parked", ["a ring"]).id)
        for request in (submit, poll):  # warm up: a new service has yet to start its threads
            asyncio.run(_closed(host, request, WARM_UP_SECONDS))
        idle = {
            "submits": asyncio.run(_open(host, submit, WANTED_SUBMITS, seconds)),
            "polls": asyncio.run(_open(host, poll, WANTED_POLLS, seconds)),
        }
        work = client.submit("demo", [{"prompt": "a green star", "n": 2000}], steps=100)
        serving.until(lambda: work.refresh().counts.running > 0)
        busy = {
            "submits": asyncio.run(_closed(host, submit, seconds)),
            "polls": asyncio.run(_closed(host, poll, seconds)),
        }
        work.cancel()
    _print_loads("next to a busy worker, as fast as it responds", busy)
    _print_loads(f"worker idle, {WANTED_SUBMITS:g} submits/s, then {WANTED_POLLS:g} polls/s", idle)
    return {
        "submits_per_second": busy["submits"].rate,
        "polls_per_second": busy["polls"].rate,
        "submit_p99_ms": idle["submits"].quantile(0.99),
        "poll_p99_ms": idle["polls"].quantile(0.99),
    }


async def _closed(host: str, request: Request, seconds: float) -> Load:
    """Send on every connection as soon as it has been answered."""
    load, began = Load(), time.perf_counter()

    async def ask() -> None:
        async with Connection(host) as connection:
            while time.perf_counter() - began < seconds:
                asked = time.perf_counter()
                await connection.ask(request())
                load.seconds.append(time.perf_counter() - asked)

    await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))
    load.took = time.perf_counter() - began
    return load


async def _open(host: str, request: Request, rate: float, seconds: float) -> Load:
    """Send requests at `rate`, whether or not earlier ones have been answered.

    A request's time counts from when it was due, so a stall counts for every request that it
    delayed.
    """
    load, began, turn = Load(), time.perf_counter(), iter(range(round(rate * seconds)))

    async def ask() -> None:
        async with Connection(host) as connection:
            for number in turn:
                due = began + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                await connection.ask(request())
                load.seconds.append(time.perf_counter() - due)

    await asyncio.gather(*(ask() for _ in range(4 * CONNECTIONS)))
    load.took = time.perf_counter() - began
    return load


class Connection:
    """A persistent connection; responses must have a Content-Length."""

    def __init__(self, host: str) -> None:
        name, _, port = host.rpartition(":")
        self._address = name, int(port)

    async def __aenter__(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection(*self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def ask(self, request: bytes) -> bytes:
        """Send a request; return the response's body. Raises RuntimeError unless it succeeded."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await self._reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 20"):
            raise RuntimeError(f"{head!r} {body!r}")
        return body


def _submission(host: str) -> Request:
    body = json.dumps({"model": "parked", "prompts": ["a large red circle on a white background"]})
    request = (
        f"POST /v1/jobs HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    ).encode()
    return lambda: request


def _poll(host: str, job_id: str) -> Request:
    request = f"GET /v1/jobs/{job_id} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
    return lambda: request


@contextmanager
def _up() -> Iterator[tuple[str, Client]]:
    """A service and one ready worker of the bundled model; the model `parked` has no worker."""
    entry = (CATALOG.parent / "demo" / "model").absolute()
    with serving.folder() as data:
        models = data / "models.toml"
        models.write_text(MODELS.format(path=entry))
        with serving.service(data, models, "demo", max_unfinished="1000000") as client:
            yield client.server.removeprefix("http://"), client


def _print_loads(title: str, loads: dict[str, Load]) -> None:
    print(f"\n{title} (per second; ms: median, 95 %, 99 %)")
    for name, load in loads.items():
        cells = "".join(f"{load.quantile(share):9.1f}" for share in (0.5, 0.95, 0.99))
        print(f"  {name:<12}{load.rate:10.1f}{cells}")
