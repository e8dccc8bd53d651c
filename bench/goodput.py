"""Goodput on a Poisson trace with mixed steps: how much load each policy can serve on time.

Goodput is the highest load at which 90 % of the requests finish within 4 times their solo time. A
load of 1 is the arrival rate that one-at-a-time serving can just keep up with. The goodput is found
by bisection over the load. All traces last equally long. With a fixed number of requests, a fast
policy would only get a short burst and could work it off afterwards. Solo times are measured before
and after each trace; if the machine became faster or slower during a trace, it's run again.

The baseline is a server that runs one request at a time, with decoding within the call or on its
own thread, whichever has more goodput.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bench.latency import print_summaries, summary
from bench.models import LARGE, SMALL, STEPS, Regime, loaded, measured, requests
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
from workers.scheduler import Costs

IN_TIME = 4.0
"""A request is on time if it finishes within this many times its solo time."""

SHARE = 0.9
"""The share of requests that must be on time."""

PRECISION, STRIDE = 1.08, 1.4
"""Bisection ends when the load is known up to the factor PRECISION. Before that, the load is
multiplied or divided by STRIDE until it's bracketed."""

STEADY, TRIES = 1.15, 3
"""A trace counts if the machine's speed before and after it differs by at most this factor. After
this many tries, the last trace counts anyway."""

TRACE = 60.0
"""A trace lasts as long as this many requests take alone, one after the other. In a much shorter
trace, a policy could be on time at a load that it can't sustain."""

FEWEST = 20
"""A trace has at least this many requests, however long it gets."""

FIRST, LEAST = 0.5, 0.05
"""The first load to try, and the load below which a policy has no goodput."""

FIFO, FIFO_ASIDE = "one at a time", "one at a time, decoding aside"
WHOLE, PINNED, FAST = "whole calls", "ours, reproducible", "ours, fast"

SHOWN = (FIFO, WHOLE, PINNED, FAST)
LOADS = (0.7, 1.0, 1.3)
"""Policies and loads whose latencies are shown; one at a time has a capacity of about 1."""

POLICIES: dict[str, tuple[Policy, bool]] = {
    FIFO: (one_at_a_time, False),
    FIFO_ASIDE: (decoding_aside, False),
    WHOLE: (whole_calls, False),
    PINNED: (stepwise, True),
    FAST: (stepwise, False),
}
"""The contenders: the policy, and the class of the requests."""


def arrivals(rate: float, requests: Sequence[ImageRequest], seed: int) -> list[Arrival]:
    """A Poisson process of `rate` requests per second over these requests, in order."""
    draw, at, trace = random.Random(seed), 0.0, []
    for request in requests:
        at += draw.expovariate(rate)
        trace.append(Arrival(at, request))
    return trace


@dataclass(frozen=True, slots=True)
class Trial:
    """One policy over one model; `solo` times what requests take alone, in seconds by steps.

    `make_requests` makes the given number of requests; more of them start with the same ones.
    """

    policy: Policy
    pipeline: Pipeline
    costs: Costs
    make_requests: Callable[[int], Sequence[ImageRequest]]
    solo: Callable[[], dict[int, float]]
    seed: int

    def latencies(self, load: float) -> tuple[list[float], list[float]]:
        """Latencies of one trace at this load, in seconds and in multiples of solo time."""
        count = max(FEWEST, round(load * TRACE))
        before = self.solo()
        for _ in range(TRIES):
            rate = load / statistics.mean(before.values())
            trace = arrivals(rate, self.make_requests(count), self.seed)
            seconds = self.policy(self.pipeline, self.costs, trace)
            began, before = before, self.solo()
            change = sum(before.values()) / sum(began.values())
            if 1 / STEADY <= change <= STEADY:
                break
            print(f"  the machine's speed changed by {change:.2f} during a trace", flush=True)
        over_solo = [
            latency / began[arrival.request.steps]
            for latency, arrival in zip(seconds, trace, strict=True)
        ]
        return seconds, over_solo

    def carries(self, load: float) -> bool:
        """Whether enough of the requests finish on time at this load."""
        _, over_solo = self.latencies(load)
        return sum(multiple <= IN_TIME for multiple in over_solo) >= SHARE * len(over_solo)


def compare(regime: Regime, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Goodput of each policy for each seed; the search starts from the last load found.

    Also prints the latencies at a few loads, for the first seed.
    """
    pipeline, model = loaded(regime)
    costs = measured(pipeline, model)

    def solo() -> dict[int, float]:
        return {steps: solo_seconds(pipeline, requests(model, 1, 0, [steps])[0]) for steps in STEPS}

    def trial(name: str, seed: int) -> Trial:
        policy, reproducible = POLICIES[name]
        make_requests = partial(requests, model, seed=seed, reproducible=reproducible)
        return Trial(policy, pipeline, costs, make_requests, solo, seed)

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
    """The median over seeds of our load divided by the other's."""
    return statistics.median(a / b for a, b in zip(results[ours], results[other], strict=True))


def ratios(regime: Regime, results: dict[str, list[float]]) -> Metrics:
    """The goodput of both our classes over that of one at a time and over that of whole calls.

    One at a time has two forms, and the better one counts for each seed, because a decoding thread
    helps only if there's a core for it.
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
