"""Latency under load: eight equal callers, and Poisson traffic, compared with other servers.

The first part runs on simulated devices, one on which batches pay and one on which they don't, at
loads below, at and above the capacity of one at a time. The second part is real: a worker of the
bundled model, and eight callers who each ask for the next image, through the queue, as soon as they
have one. Served one at a time, in order of arrival, each of them would wait for eight images.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import serving
from bench.latency import percentile, print_summaries, summary
from bench.report import Metrics
from bench.simulation import (
    BATCHES_PAY,
    NO_BATCH_PAYS,
    Load,
    Policy,
    closed,
    one_at_a_time,
    ours,
    poisson,
    whole_calls,
)
from jobs.catalog import load_catalog
from jobs.queue.store import Store
from jobs.request import ImageRequest
from workers.pass_timer import probe
from workers.scheduler import Costs

CATALOG = Path("models.toml")

CALLERS, REQUESTS = 8, 110
STEPS, MIXED = (20,), (8, 20, 28)
LOADS = (0.7, 1.0, 1.3)
Loads = Callable[..., Load]
"""Makes a fresh load of the same requests; takes `reproducible`."""

DEVICES = {"batches pay": BATCHES_PAY, "no batch pays": NO_BATCH_PAYS}


def run() -> Metrics:
    """Print the simulated tables, then the real one; return the figures of the eight callers."""
    metrics = _simulated()
    return metrics | _served()


def _simulated() -> Metrics:
    metrics: Metrics = {}
    for device, costs in DEVICES.items():
        rows = _compared(costs, partial(closed, CALLERS, REQUESTS, STEPS))
        print_summaries(f"simulated, {device}: {CALLERS} callers, {REQUESTS} equal requests", rows)
        suffix = device.replace(" ", "_")
        worst = max(rows[2:], key=lambda row: row[1]["p99"])[1]
        metrics[f"order_p99_vs_fifo_{suffix}"] = worst["p99"] / rows[0][1]["p99"]
        metrics[f"order_p99_over_p50_{suffix}"] = worst["p99"] / worst["p50"]
        for load in LOADS:
            rows = _compared(costs, partial(poisson, load, costs, 1, MIXED))
            print_summaries(f"simulated, {device}: steps of 8, 20 and 28, load {load:g}", rows)
    return metrics


def _served() -> Metrics:
    """Latencies of the real worker's callers; solo time is measured right before and after."""
    request = probe(load_catalog(CATALOG).get("demo"))
    request = replace(request, steps=load_catalog(CATALOG).get("demo").defaults.steps)
    with serving.folder() as data, serving.workers(data, CATALOG, "demo") as store:
        metrics: Metrics = {}
        rows = []
        for reproducible in (True, False):
            variant = replace(request, reproducible=reproducible)
            before = [_ask(store, "alone", variant) for _ in range(5)]
            seconds = _callers(store, variant)
            solo = min(before + [_ask(store, "alone", variant) for _ in range(5)])
            name = "reproducible" if reproducible else "fast"
            rows.append((f"ours, {name}", summary(seconds, [s / solo for s in seconds])))
            p99, p50 = percentile(seconds, 0.99), percentile(seconds, 0.5)
            metrics[f"served_p99_vs_fifo_{name}"] = p99 / (CALLERS * solo)
            metrics[f"served_p99_over_p50_{name}"] = p99 / p50
    print_summaries(f"bundled model: {CALLERS} callers, {REQUESTS} equal requests", rows)
    return metrics


def _callers(store: Store, request: ImageRequest) -> list[float]:
    """Seconds of each request; every caller is its own tenant."""
    seconds: list[float] = []
    tickets = iter(range(REQUESTS))
    lock = threading.Lock()

    def call(tenant: str) -> None:
        while True:
            with lock:
                ticket = next(tickets, None)
            if ticket is None:
                return
            took = _ask(store, tenant, replace(request, seed=ticket))
            with lock:
                seconds.append(took)

    threads = [
        threading.Thread(target=call, args=(f"caller {n}",), daemon=True) for n in range(CALLERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(seconds) != REQUESTS:
        raise RuntimeError("a benchmark's caller failed")
    return seconds


def _ask(store: Store, tenant: str, request: ImageRequest) -> float:
    """Seconds from submitting one image to its commit."""
    began = time.perf_counter()
    submitted = store.submit(
        [request],
        tenant=tenant,
        priority=5,
        metadata={},
        spec={},
        quota=REQUESTS,
        keep_seconds=600,
        max_attempts=3,
    )
    serving.until(lambda: store.job(submitted.job_id, None).state.finished, pause=0.005)
    return time.perf_counter() - began


def _compared(costs: Costs, load: Loads) -> list[tuple[str, Metrics]]:
    """One at a time, whole calls, and both of our classes, each under the same load."""
    contenders: list[tuple[str, Policy, bool]] = [
        ("one at a time", one_at_a_time, False),
        ("whole calls", whole_calls, False),
        ("ours, reproducible", ours, True),
        ("ours, fast", ours, False),
    ]
    rows = []
    for name, policy, reproducible in contenders:
        served = policy(load(reproducible=reproducible), costs)
        seconds = [result.done - result.request.at for result in served]
        rows.append((name, summary(seconds, [result.over_solo(costs) for result in served])))
    return rows
