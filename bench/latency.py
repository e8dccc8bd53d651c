"""Latencies of requests relative to their solo times: percentiles, and the share on time."""

import math
from collections.abc import Sequence

from bench.report import Metrics

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
MULTIPLES = (3, 4)
"""Multiples of the solo time; the share of requests within each is shown."""


def percentile(figures: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest figure that `share` of all figures don't exceed."""
    ordered = sorted(figures)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(seconds: Sequence[float], over_solo: Sequence[float]) -> Metrics:
    """p50, p95, p99 in seconds and in solo times, and the shares within 3 and 4 solo times."""
    figures = {name: percentile(over_solo, share) for name, share in SHARES.items()}
    figures |= {f"{name}_s": percentile(seconds, share) for name, share in SHARES.items()}
    for most in MULTIPLES:
        within = sum(multiple <= most for multiple in over_solo)
        figures[f"within_{most}x"] = within / len(over_solo)
    return figures


def print_summaries(title: str, rows: Sequence[tuple[str, Metrics]]) -> None:
    """A row per contender: percentiles as multiples of solo time and seconds, and attainment."""
    print(f"\n{title}")
    print(f"  {'':<38}{'p50':>8}{'p95':>8}{'p99':>8}   (seconds){'':>15}within 3x     4x")
    for name, figures in rows:
        multiples = "".join(f"{figures[share]:8.2f}" for share in SHARES)
        seconds = "/".join(f"{figures[f'{share}_s']:.2f}" for share in SHARES)
        within = "".join(f"{figures[f'within_{most}x']:8.0%}" for most in MULTIPLES)
        print(f"  {name:<38}{multiples}   {seconds:<22}{within}", flush=True)
