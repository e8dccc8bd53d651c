"""Goodput on a Poisson trace with mixed steps: how much load each policy carries in good time.

Goodput is the highest rate of arrivals, in requests per second, at which 90 % of the requests
finish within 4 times the time that each would take alone. Found by bisection over the rate, on
the same arrivals for every policy; policies take turns within a seed, so that a machine that slows
down slows all of them.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from bench.models import LARGE, SMALL, STEPS, Regime, loaded, requests
from bench.policies import Arrival, Policy, one_at_a_time, solo_seconds, stepwise, whole_calls
from bench.report import Metrics, table
from jobs.request import ImageRequest
from pipelines.seam import Pipeline
from workers.profile import measure, probe
from workers.scheduler import Costs

IN_TIME = 4.0
"""A request is in time when it finishes within this many times its solo time."""

SHARE = 0.9
"""The share of requests that must be in time."""

PRECISION, STRIDE = 1.08, 1.4
"""Bisection ends when the rate is known within this factor; it begins in strides of that one."""

POLICIES: dict[str, tuple[Policy, bool]] = {
    "one at a time": (one_at_a_time, False),
    "whole calls": (whole_calls, False),
    "ours, reproducible": (stepwise, True),
    "ours, fast": (stepwise, False),
}
"""What is compared: the policy, and the class of the requests."""


def arrivals(rate: float, wanted: Sequence[ImageRequest], seed: int) -> list[Arrival]:
    """A Poisson process of `rate` requests per second over these requests, in order."""
    draw, at, trace = random.Random(seed), 0.0, []
    for request in wanted:
        at += draw.expovariate(rate)
        trace.append(Arrival(at, request))
    return trace


def carries(
    policy: Policy,
    pipeline: Pipeline,
    costs: Costs,
    wanted: Sequence[ImageRequest],
    solo: dict[int, float],
    seed: int,
    rate: float,
) -> bool:
    """Whether enough of the requests, coming at this rate, finish in time under this policy."""
    trace = arrivals(rate, wanted, seed)
    latencies = policy(pipeline, costs, trace)
    in_time = [
        latency <= IN_TIME * solo[arrival.request.steps]
        for latency, arrival in zip(latencies, trace, strict=True)
    ]
    return sum(in_time) >= SHARE * len(in_time)


def goodput(carried: Callable[[float], bool], guess: float) -> float:
    """The highest rate carried, in requests per second: bracketed from `guess`, then bisected."""
    low = high = guess
    if carried(guess):
        while carried(high := high * STRIDE):
            low = high
    else:
        while not carried(low := low / STRIDE):
            high = low
    while high / low > PRECISION:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if carried(middle) else (low, middle)
    return low


def compare(regime: Regime, seeds: Sequence[int], count: int) -> dict[str, list[float]]:
    """Goodput of each policy for each seed; what it starts from is the last rate found."""
    pipeline, model = loaded(regime)
    costs = measure(pipeline, probe(model))
    solo = {steps: solo_seconds(pipeline, requests(model, 1, 0, [steps])[0]) for steps in STEPS}
    guesses: dict[str, float] = {}
    rate = 0.5 / statistics.mean(solo.values())
    results: dict[str, list[float]] = {name: [] for name in POLICIES}
    for seed in seeds:
        for name, (policy, reproducible) in POLICIES.items():
            wanted = requests(model, count, seed, reproducible=reproducible)
            run_at = partial(carries, policy, pipeline, costs, wanted, solo, seed)
            guesses[name] = rate = goodput(run_at, guesses.get(name, rate))
            results[name].append(rate)
            print(f"  {regime.name}, seed {seed}: {name} {rate:.2f}/s", flush=True)
    return results


def ratio(results: dict[str, list[float]], ours: str, other: str) -> float:
    """The median over seeds of our rate over the other's."""
    return statistics.median(a / b for a, b in zip(results[ours], results[other], strict=True))


def run(seeds: Sequence[int] = (1, 2, 3), counts: Sequence[int] = (100, 30)) -> Metrics:
    """Both regimes, with so many requests each; prints a table of each and returns the ratios."""
    metrics: Metrics = {}
    for regime, count in zip((SMALL, LARGE), counts, strict=True):
        results = compare(regime, seeds, count)
        base = results["one at a time"]
        rows = [
            (name, rates, statistics.median(r / b for r, b in zip(rates, base, strict=True)))
            for name, rates in results.items()
        ]
        table(f"goodput, {regime.name} regime (requests/s; median, min..max)", rows)
        suffix = "" if regime is SMALL else "_large"
        metrics[f"goodput_vs_fifo{suffix}"] = ratio(results, "ours, fast", "one at a time")
        metrics[f"goodput_vs_whole_call{suffix}"] = ratio(results, "ours, fast", "whole calls")
        metrics[f"goodput_vs_fifo_reproducible{suffix}"] = ratio(
            results, "ours, reproducible", "one at a time"
        )
    return metrics
