"""Goodput on a Poisson trace with mixed steps: how much load each policy carries in good time.

Goodput is the highest rate of arrivals, in requests per second, at which 90 % of the requests
finish within 4 times the time that each would take alone. Found by bisection over the rate. Every
trace lasts as long as every other, so that a policy that carries more is shown more requests and
cannot do by putting off a short burst; policies take turns within a seed, so that a machine that
slows down slows all of them.

The baseline is a server that runs one at a time, with decoding within the call or on a thread of
its own, whichever carries more.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from bench.models import LARGE, SMALL, STEPS, Regime, loaded, requests
from bench.policies import (
    Arrival,
    Policy,
    decoding_aside,
    one_at_a_time,
    solo_seconds,
    stepwise,
    whole_calls,
)
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

TRACE = 60.0
"""A trace lasts as long as so many requests alone, one after the other; in a much shorter one a
policy gets by with a load that it cannot carry."""

FEWEST = 20
"""A trace has at least so many requests, however long that takes."""

IDLE = 0.05
"""A policy that cannot even carry this share of what requests alone would fill has no goodput."""

FIFO, FIFO_ASIDE = "one at a time", "one at a time, decoding aside"
WHOLE, PINNED, FAST = "whole calls", "ours, reproducible", "ours, fast"

POLICIES: dict[str, tuple[Policy, bool]] = {
    FIFO: (one_at_a_time, False),
    FIFO_ASIDE: (decoding_aside, False),
    WHOLE: (whole_calls, False),
    PINNED: (stepwise, True),
    FAST: (stepwise, False),
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
    wanted: Callable[[int], Sequence[ImageRequest]],
    solo: dict[int, float],
    seed: int,
    seconds: float,
    rate: float,
) -> bool:
    """Whether enough of the requests, coming at this rate for so long, finish in time.

    `wanted` makes so many requests, the first ones alike for any number.
    """
    count = max(FEWEST, round(rate * seconds))
    trace = arrivals(rate, wanted(count), seed)
    latencies = policy(pipeline, costs, trace)
    in_time = [
        latency <= IN_TIME * solo[arrival.request.steps]
        for latency, arrival in zip(latencies, trace, strict=True)
    ]
    return sum(in_time) >= SHARE * len(in_time)


def goodput(carried: Callable[[float], bool], guess: float, least: float) -> float:
    """The highest rate carried, in requests per second: bracketed from `guess`, then bisected.

    Raises RuntimeError when not even the rate `least` is carried.
    """
    low = high = guess
    if carried(guess):
        while carried(high := high * STRIDE):
            low = high
    else:
        while not carried(low := low / STRIDE):
            high = low
            if low < least:
                raise RuntimeError(f"not even {least:.2g} requests/s are carried in good time")
    while high / low > PRECISION:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if carried(middle) else (low, middle)
    return low


def compare(regime: Regime, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Goodput of each policy for each seed; what it starts from is the last rate found."""
    pipeline, model = loaded(regime)
    costs = measure(pipeline, probe(model))
    solo = {steps: solo_seconds(pipeline, requests(model, 1, 0, [steps])[0]) for steps in STEPS}
    guesses: dict[str, float] = {}
    alone = 1 / statistics.mean(solo.values())
    lasts = TRACE / alone
    rate = 0.5 * alone
    results: dict[str, list[float]] = {name: [] for name in POLICIES}
    for seed in seeds:
        for name in results:
            policy, reproducible = POLICIES[name]
            wanted = partial(requests, model, seed=seed, reproducible=reproducible)
            run_at = partial(carries, policy, pipeline, costs, wanted, solo, seed, lasts)
            guesses[name] = rate = goodput(run_at, guesses.get(name, rate), IDLE * alone)
            results[name].append(rate)
            print(f"  {regime.name}, seed {seed}: {name} {rate:.2f}/s", flush=True)
    return results


def ratio(results: dict[str, list[float]], ours: str, other: str) -> float:
    """The median over seeds of our rate over the other's."""
    return statistics.median(a / b for a, b in zip(results[ours], results[other], strict=True))


def ratios(regime: Regime, results: dict[str, list[float]]) -> Metrics:
    """Both our classes over one at a time, in its better form for each seed, and over whole calls.

    A thread for decoding helps where there is a core for it, and costs where there is not.
    """
    suffix = "" if regime is SMALL else "_large"
    alone = [max(pair) for pair in zip(results[FIFO], results[FIFO_ASIDE], strict=True)]
    compared = {**results, FIFO: alone}
    return {
        f"goodput_vs_fifo{suffix}": ratio(compared, FAST, FIFO),
        f"goodput_vs_whole_call{suffix}": ratio(compared, FAST, WHOLE),
        f"goodput_vs_fifo_reproducible{suffix}": ratio(compared, PINNED, FIFO),
        f"goodput_vs_whole_call_reproducible{suffix}": ratio(compared, PINNED, WHOLE),
    }


def run(seeds: Sequence[int] = (1, 2, 3)) -> Metrics:
    """Both regimes; prints a table of each and returns the ratios."""
    metrics: Metrics = {}
    for regime in (SMALL, LARGE):
        results = compare(regime, seeds)
        table(
            f"goodput, {regime.name} regime (requests/s; median, min..max)",
            [(name, rates, ratio(results, name, FIFO)) for name, rates in results.items()],
        )
        metrics |= ratios(regime, results)
    return metrics
