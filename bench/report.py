"""Tables for people and one JSON line for programs."""

import json
import statistics
from collections.abc import Sequence

Metrics = dict[str, float]
"""Figures by name; ratios unless the name says otherwise."""


def table(title: str, rows: Sequence[tuple[str, Sequence[float], float]]) -> None:
    """Print a row per contender: median and range of its figures, and its ratio to the base."""
    print(f"\n{title}")
    for name, figures, against in rows:
        middle, low, high = statistics.median(figures), min(figures), max(figures)
        print(f"  {name:<28}{middle:10.2f}   ({low:.2f}..{high:.2f}){against:9.2f}x")


def json_line(bench: str, metrics: Metrics) -> None:
    """Print the last line of a benchmark, for programs."""
    rounded = {name: round(value, 4) for name, value in metrics.items()}
    print(json.dumps({"bench": bench, "metrics": rounded}), flush=True)
