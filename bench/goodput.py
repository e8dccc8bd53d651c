"""Goodput on a Poisson trace with mixed steps: how much load each policy carries in good time.

Goodput is the highest load at which 90 % of the requests finish within 4 times the time that each
would take alone. A load of 1 is the rate of arrivals that requests run alone, one after the other,
would just fill. Found by bisection over the load. Every trace lasts as long as every other, so that
a policy that carries more is shown more requests and cannot do by putting off a short burst. What a
request takes alone is timed anew before and after each trace, and a trace during which the machine
became faster or slower is run again.

The baseline is a server that runs one at a time, with decoding within the call or on a thread of
its own, whichever carries more.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bench.latency import print_summaries, summary
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
from bench.search import highest
from jobs.request import ImageRequest
from pipelines.seam import Pipeline
from workers.profile import measure, probe
from workers.scheduler import Costs

IN_TIME = 4.0
"""A request is in time when it finishes within this many times its solo time."""

SHARE = 0.9
"""The share of requests that must be in time."""

PRECISION, STRIDE = 1.08, 1.4
"""Bisection ends when the load is known within this factor; it begins in strides of that one."""

STEADY, TRIES = 1.15, 3
"""A trace counts if the machine's pace before and after it differs by this factor at most; the last
of so many tries counts anyway."""

TRACE = 60.0
"""A trace lasts as long as so many requests alone, one after the other; in a much shorter one a
policy gets by with a load that it cannot carry."""

FEWEST = 20
"""A trace has at least so many requests, however long that takes."""

FIRST, LEAST = 0.5, 0.05
"""The load that is tried first, and the one below which a policy has no goodput."""

FIFO, FIFO_ASIDE = "one at a time", "one at a time, decoding aside"
WHOLE, PINNED, FAST = "whole calls", "ours, reproducible", "ours, fast"

SHOWN = (FIFO, WHOLE, PINNED, FAST)
LOADS = (0.7, 1.0, 1.3)
"""Policies and loads whose latencies are shown: below, at and above what one at a time fills."""

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


@dataclass(frozen=True, slots=True)
class Trial:
    """One policy over one model; `solo` times what requests take alone, in seconds by steps.

    `wanted` makes that many requests, the first ones alike for any number.
    """

    policy: Policy
    pipeline: Pipeline
    costs: Costs
    wanted: Callable[[int], Sequence[ImageRequest]]
    solo: Callable[[], dict[int, float]]
    seed: int

    def latencies(self, load: float) -> tuple[list[float], list[float]]:
        """Of the requests of one trace at this load: seconds, and multiples of solo time."""
        count = max(FEWEST, round(load * TRACE))
        before = self.solo()
        for _ in range(TRIES):
            rate = load / statistics.mean(before.values())
            trace = arrivals(rate, self.wanted(count), self.seed)
            seconds = self.policy(self.pipeline, self.costs, trace)
            began, before = before, self.solo()
            change = sum(before.values()) / sum(began.values())
            if 1 / STEADY <= change <= STEADY:
                break
            print(f"  the machine's pace changed by {change:.2f} during a trace", flush=True)
        over_solo = [
            latency / began[arrival.request.steps]
            for latency, arrival in zip(seconds, trace, strict=True)
        ]
        return seconds, over_solo

    def carries(self, load: float) -> bool:
        """Whether enough of the requests, coming at this load, finish in time."""
        _, over_solo = self.latencies(load)
        return sum(one <= IN_TIME for one in over_solo) >= SHARE * len(over_solo)


def compare(regime: Regime, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Goodput of each policy for each seed; the search starts from the last load found.

    Prints the latencies at a few loads as well, of the first seed.
    """
    pipeline, model = loaded(regime)
    costs = measure(pipeline, probe(model))

    def solo() -> dict[int, float]:
        return {steps: solo_seconds(pipeline, requests(model, 1, 0, [steps])[0]) for steps in STEPS}

    def trial(name: str, seed: int) -> Trial:
        policy, reproducible = POLICIES[name]
        wanted = partial(requests, model, seed=seed, reproducible=reproducible)
        return Trial(policy, pipeline, costs, wanted, solo, seed)

    guesses: dict[str, float] = {}
    results: dict[str, list[float]] = {name: [] for name in POLICIES}
    for seed in seeds:
        for name in results:
            carries, guess = trial(name, seed).carries, guesses.get(name, FIRST)
            load = highest(carries, guess, LEAST, precision=PRECISION, stride=STRIDE)
            guesses[name] = load
            results[name].append(load)
            print(f"  {regime.name}, seed {seed}: {name} {load:.2f}", flush=True)
    for load in LOADS:
        rows = [(name, summary(*trial(name, seeds[0]).latencies(load))) for name in SHOWN]
        print_summaries(f"latency over solo, {regime.name} regime, load {load:g}", rows)
    return results


def ratio(results: dict[str, list[float]], ours: str, other: str) -> float:
    """The median over seeds of our load over the other's."""
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
            f"goodput, {regime.name} regime (load; median, min..max)",
            [(name, loads, ratio(results, name, FIFO)) for name, loads in results.items()],
        )
        metrics |= ratios(regime, results)
    return metrics
