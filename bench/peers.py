"""imagemill compared with LitServe around plain diffusers: single images over HTTP.

The contenders serve the bundled model. They are LitServe without batches, LitServe with
dynamic batches of 8, and imagemill in both classes. All run on this machine, in turn, with the same
prompts, seeds and number of torch threads. There are three loads: all requests at once with equal
steps, all at once with mixed steps, and Poisson arrivals at 0.8 of LitServe's rate with equal
steps. imagemill also makes the same images as one job. LitServe without batches only runs in the
first round, to show how much LitServe gains from batching.

Every contender has THREADS torch threads. With one thread, a small machine has a core left for the
rest: HTTP, and for imagemill also decoding, encoding and files.
"""

import asyncio
import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image

from bench import serving
from bench.report import Metrics, table
from bench.submits import Connection
from imagemill.client.clients import Client
from jobs.catalog import Model, load_catalog
from jobs.job import State
from jobs.runtime import lifeline
from workers.scheduler import GOOD_TIME

CATALOG = Path("models.toml")
THREADS = int(os.environ.get("BENCH_THREADS", "1"))
MIXED = (8, 20, 28)
LOAD = 0.8
"""Rate of the Poisson arrivals, as a share of LitServe's rate."""

LIT_1, LIT_8 = "LitServe", "LitServe, batches of 8"
REPRODUCIBLE, FAST = "ours, reproducible", "ours, fast"
SAME_PICTURE = 1.0
"""Largest mean difference of equal pictures of a request, in levels of 255."""


@dataclass(frozen=True, slots=True)
class Size:
    """The number of requests per load."""

    rounds: int
    equal: int
    mixed: int
    arrivals: int
    job: int


FULL = Size(rounds=3, equal=64, mixed=18, arrivals=30, job=48)
QUICK = Size(rounds=1, equal=16, mixed=6, arrivals=8, job=8)


@dataclass(slots=True)
class Contender:
    """A server under test, and its results of each round."""

    name: str
    address: str
    processes: list[psutil.Process]
    reproducible: bool | None = None
    equal: list[float] = field(default_factory=list)
    mixed: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    jobs: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def body(self, prompt: str, seed: int, steps: int, model: Model) -> bytes:
        """A request for one image at the model's default size."""
        size = f"{model.defaults.width}x{model.defaults.height}"
        fields = {"prompt": prompt, "seed": seed, "steps": steps, "size": size}
        own = {} if self.reproducible is None else {"reproducible": self.reproducible}
        return json.dumps({**fields, **own}).encode()


def run(size: Size = FULL) -> Metrics:
    """Run all contenders, round by round."""
    model = load_catalog(CATALOG).get("demo")
    with _contenders(model) as (contenders, client, service):
        _check_equal(contenders, model)
        solo = min(asyncio.run(_drain(contenders[0], model, [8]))[1] for _ in range(2))
        service_ms: list[float] = []
        for number in range(size.rounds):
            _round(contenders, client, model, size, number, (service, service_ms))
    return _report(contenders, solo, service_ms)


def quick() -> Metrics:
    """Run one short round to check that the benchmark works. Its figures aren't meaningful."""
    return run(QUICK)


def _round(
    contenders: Sequence[Contender],
    client: Client,
    model: Model,
    size: Size,
    number: int,
    counted: tuple[psutil.Process, list[float]],
) -> None:
    """Run one round of all loads; the service's CPU time is counted during each drain of ours."""
    service, service_ms = counted
    taking_part = [contender for contender in contenders if number == 0 or contender.name != LIT_1]
    for contender in taking_part:
        before, all_before = _cpu([service]), _cpu(contender.processes)
        contender.equal.append(
            asyncio.run(_drain(contender, model, [model.defaults.steps] * size.equal))[0]
        )
        contender.cpu.append(1000 * (_cpu(contender.processes) - all_before) / size.equal)
        _print_figure(contender, "equal steps", contender.equal[-1])
        if contender.reproducible is not None:
            service_ms.append(1000 * (_cpu([service]) - before) / size.equal)
    for contender in taking_part:
        steps = [MIXED[place % len(MIXED)] for place in range(size.mixed)]
        contender.mixed.append(asyncio.run(_drain(contender, model, steps))[0])
        _print_figure(contender, "mixed steps", contender.mixed[-1])
    rate = LOAD * _named(contenders, LIT_8).equal[-1]
    due = _poisson(rate, size.arrivals, seed=number)
    for contender in (contender for contender in taking_part if contender.name != LIT_1):
        contender.latencies += asyncio.run(_arrive(contender, model, due))
        if contender.reproducible is not None:
            contender.jobs.append(_as_one_job(client, model, size.job, contender.reproducible))
            _print_figure(contender, "one job", contender.jobs[-1])


async def _drain(contender: Contender, model: Model, steps: Sequence[int]) -> tuple[float, float]:
    """Images per second of requests that all arrive at once, and seconds to the last."""
    began = time.perf_counter()
    prompts = _prompts(len(steps))
    await asyncio.gather(
        *(
            _ask(contender, contender.body(prompt, seed, count, model))
            for seed, (prompt, count) in enumerate(zip(prompts, steps, strict=True))
        )
    )
    took = time.perf_counter() - began
    return len(steps) / took, took


async def _arrive(contender: Contender, model: Model, due: Sequence[float]) -> list[float]:
    """Seconds of each request from its due time to its answer."""
    began = time.perf_counter()

    async def arrive(seed: int, prompt: str) -> float:
        await asyncio.sleep(max(0.0, began + due[seed] - time.perf_counter()))
        await _ask(contender, contender.body(prompt, seed, model.defaults.steps, model))
        return time.perf_counter() - began - due[seed]

    prompts = _prompts(len(due))
    return list(await asyncio.gather(*(arrive(seed, text) for seed, text in enumerate(prompts))))


async def _ask(contender: Contender, body: bytes) -> bytes:
    """The picture's bytes; each request has its own connection, as from a separate caller."""
    host = contender.address.removeprefix("http://")
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nhost: {host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    async with Connection(host) as connection:
        answer = json.loads(await connection.ask(head.encode() + body))
    return base64.b64decode(answer["data"][0]["b64_json"])


def _as_one_job(client: Client, model: Model, count: int, reproducible: bool) -> float:
    """Images per second of the equal drain's first requests as one job."""
    prompts = [{"prompt": text, "seed": seed} for seed, text in enumerate(_prompts(count))]
    began = time.time()
    job = client.submit(model.name, prompts, reproducible=reproducible)
    job.wait()
    if job.state is not State.SUCCEEDED:
        raise RuntimeError("a benchmark's image failed")
    finished = float(client.get(f"/v1/jobs/{job.id}", images="none")["finished"])
    return count / (finished - began)


def _check_equal(contenders: Sequence[Contender], model: Model) -> None:
    """Raise RuntimeError unless all contenders make the same picture from the same request."""
    body = ("a large red circle on a blue background", 7, model.defaults.steps, model)
    pictures = [
        np.asarray(
            Image.open(io.BytesIO(asyncio.run(_ask(contender, contender.body(*body))))), dtype=float
        )
        for contender in contenders
    ]
    for contender, picture in zip(contenders, pictures, strict=True):
        difference = float(np.abs(picture - pictures[0]).mean())
        if difference > SAME_PICTURE:
            raise RuntimeError(f"{contender.name}'s picture differs by {difference:.2f} of 255")


def _report(contenders: Sequence[Contender], solo: float, service_ms: list[float]) -> Metrics:
    """Print the tables; return the figures with targets, and some without."""
    lit = _named(contenders, LIT_8)
    for title, rates in (("equal steps", "equal"), ("mixed steps", "mixed")):
        base = statistics.median(getattr(lit, rates))
        rows = [(c.name, getattr(c, rates)) for c in contenders]
        table(
            f"all at once, {title}, {THREADS} torch threads (images/s; median, min..max)",
            [(name, figures, statistics.median(figures) / base) for name, figures in rows],
        )
    base = statistics.median(lit.cpu)
    table(
        "all at once, equal steps: CPU of all processes (ms per image; median, min..max)",
        [
            (contender.name, contender.cpu, statistics.median(contender.cpu) / base)
            for contender in contenders
        ],
    )
    loaded = [contender for contender in contenders if contender.latencies]
    print(
        f"\nPoisson arrivals at {LOAD:g} of {LIT_8} (seconds; on time: within {GOOD_TIME:g}x alone)"
    )
    print(f"  {'':<28}{'p50':>8}{'p95':>8}{'p99':>8}{'on time':>15}")
    for contender in loaded:
        cells = "".join(f"{_quantile(contender.latencies, q):8.2f}" for q in (0.5, 0.95, 0.99))
        print(f"  {contender.name:<28}{cells}{_attainment(contender, solo):15.0%}")
    jobs = [(contender.name, contender.jobs, 1.0) for contender in contenders if contender.jobs]
    table("the same images as one job (images/s; median, min..max)", jobs)
    print(f"\nservice CPU: {statistics.median(service_ms):.2f} ms per request")
    metrics = {"service_cpu_ms": statistics.median(service_ms)}
    for key, name in (("fast", FAST), ("reproducible", REPRODUCIBLE)):
        contender = _named(contenders, name)
        metrics |= {
            f"{key}_vs_litserve_equal": _ratio(contender.equal, lit.equal),
            f"{key}_vs_litserve_mixed": _ratio(contender.mixed, lit.mixed),
            f"{key}_p99_vs_litserve": _p99(contender) / _p99(lit),
            f"{key}_cpu_vs_litserve": statistics.median(contender.cpu) / base,
            f"{key}_p50_seconds": _quantile(contender.latencies, 0.5),
            f"{key}_in_good_time": _attainment(contender, solo),
            f"{key}_job_images_per_second": statistics.median(contender.jobs),
        }
    return {**metrics, "litserve_in_good_time": _attainment(lit, solo)}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of our figure divided by the other's in the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _p99(contender: Contender) -> float:
    return _quantile(contender.latencies, 0.99)


def _quantile(figures: Sequence[float], share: float) -> float:
    ordered = sorted(figures)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _attainment(contender: Contender, solo: float) -> float:
    """The share of requests within GOOD_TIME times LitServe's time for a single request."""
    return sum(seconds <= GOOD_TIME * solo for seconds in contender.latencies) / len(
        contender.latencies
    )


def _named(contenders: Sequence[Contender], name: str) -> Contender:
    return next(contender for contender in contenders if contender.name == name)


def _poisson(rate: float, count: int, seed: int) -> list[float]:
    draw = random.Random(seed)
    return list(accumulate(draw.expovariate(rate) for _ in range(count)))


def _prompts(count: int) -> list[str]:
    lines = Path("demo/prompts.txt").read_text().splitlines()
    return [lines[place % len(lines)] for place in range(count)]


def _cpu(processes: Sequence[psutil.Process]) -> float:
    """Seconds of CPU time that live processes have used."""
    times = [process.cpu_times() for process in processes]
    return float(sum(spent.user + spent.system for spent in times))


@contextmanager
def _contenders(model: Model) -> Iterator[tuple[list[Contender], Client, psutil.Process]]:
    """All contenders, ready and warmed up; imagemill's client, and its service's process."""
    if find_spec("litserve") is None:
        raise RuntimeError("LitServe is not installed: pip install 'imagemill[bench]'")
    with ExitStack() as stack:
        data = stack.enter_context(serving.folder())
        plain = [
            Contender(name, *stack.enter_context(_litserve(data, model, size)))
            for name, size in ((LIT_1, 1), (LIT_8, 8))
        ]  # they start while imagemill does
        settings = {"threads": str(THREADS)}
        client = stack.enter_context(serving.service(data, CATALOG, model.name, **settings))
        ours = [
            Contender(name, client.server, [], reproducible)
            for name, reproducible in ((REPRODUCIBLE, True), (FAST, False))
        ]
        for contender in (*plain, *ours):
            serving.until(lambda contender=contender: _is_healthy(contender))  # type: ignore[misc]
            rate, _ = asyncio.run(_drain(contender, model, [model.defaults.steps] * 8))
            _print_figure(contender, "ready", rate)
        # All child processes exist only now. Those that aren't LitServe's are imagemill's.
        for contender in plain:
            contender.processes += contender.processes[0].children(recursive=True)
        theirs = {process.pid for contender in plain for process in contender.processes}
        for contender in ours:
            everything = psutil.Process().children(recursive=True)
            contender.processes += [process for process in everything if process.pid not in theirs]
        yield [*plain, *ours], client, _service()


def _service() -> psutil.Process:
    """imagemill's HTTP process."""
    children = psutil.Process().children()
    return next(child for child in children if child.cmdline()[1:3] == ["-m", "service"])


@contextmanager
def _litserve(data: Path, model: Model, batch: int) -> Iterator[tuple[str, list[psutil.Process]]]:
    """A LitServe with batches of at most that size: its address and its first process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = {
        "path": str(Path(model.path).absolute()),
        "port": port,
        "batch": batch,
        "threads": THREADS,
        "guidance": model.defaults.guidance_scale,
    }
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with (data / f"litserve-{batch}.log").open("wb") as log:
        process = lifeline.spawn(
            [sys.executable, "-m", "bench.litserver", *argv],
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{port}", [psutil.Process(process.pid)]
    finally:
        left = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait()
        for child in left:  # LitServe doesn't end its own children
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _is_healthy(contender: Contender) -> bool:
    path = "health" if contender.reproducible is None else "readyz"
    try:
        return httpx.get(f"{contender.address}/{path}").status_code == 200
    except httpx.HTTPError:
        return False


def _print_figure(contender: Contender, what: str, rate: float) -> None:
    """Print a figure at once, because a whole run takes minutes."""
    print(f"  {contender.name:<28}{what:<16}{rate:8.2f} images/s", file=sys.stderr, flush=True)
