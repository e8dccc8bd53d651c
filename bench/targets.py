"""The target of each figure.

A figure without a target is for information only.
"""

from dataclasses import dataclass

from bench.report import Metrics


@dataclass(frozen=True, slots=True)
class Target:
    """A limit on a figure: a minimum if `at_least`, else a maximum."""

    limit: float
    at_least: bool

    def reached(self, figure: float) -> bool:
        """Whether the figure is within the limit; NaN never is."""
        return figure >= self.limit if self.at_least else figure <= self.limit

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"


def _at_least(limit: float) -> Target:
    return Target(limit, at_least=True)


def _at_most(limit: float) -> Target:
    return Target(limit, at_least=False)


TARGETS: dict[str, Target] = {
    "goodput_vs_fifo": _at_least(4),
    "goodput_vs_whole_call": _at_least(2.5),
    "goodput_vs_fifo_large": _at_least(1.4),
    "saturated_small": _at_least(3),
    "saturated_large": _at_least(0.98),
    "service_over_bare": _at_least(0.97),
    "denoiser_idle": _at_most(0.05),
    "fair_other_caller": _at_most(3),
    "fair_same_caller": _at_most(3),
    "fair_other_caller_unequal": _at_most(3),
    "fair_same_caller_unequal": _at_most(3),
    "urgent": _at_most(3),
    "fast_vs_litserve_equal": _at_least(1.1),
    "fast_vs_litserve_mixed": _at_least(1.3),
    "reproducible_vs_litserve_equal": _at_least(0.95),
    "reproducible_vs_litserve_mixed": _at_least(1.1),
    "fast_p99_vs_litserve": _at_most(0.7),
    "reproducible_p99_vs_litserve": _at_most(0.7),
    "service_cpu_ms": _at_most(5),
    "order_p99_vs_fifo_batches_pay": _at_most(1.5),
    "order_p99_over_p50_batches_pay": _at_most(2),
    "order_p99_vs_fifo_no_batch_pays": _at_most(1.5),
    "order_p99_over_p50_no_batch_pays": _at_most(2),
    "served_p99_vs_fifo_reproducible": _at_most(1.5),
    "served_p99_over_p50_reproducible": _at_most(2),
    "served_p99_vs_fifo_fast": _at_most(1.5),
    "served_p99_over_p50_fast": _at_most(2),
    "converged_pinned": _at_least(1),
    "converged_largest": _at_least(1),
    "makespan_vs_split": _at_least(1.3),
    "submits_per_second": _at_least(200),
    "polls_per_second": _at_least(500),
    "submit_p99_ms": _at_most(50),
    "poll_p99_ms": _at_most(50),
    "eta_miss": _at_most(0.25),
}
"""Targets by figure name."""


def verdicts(metrics: Metrics) -> list[str]:
    """A line for each figure with a target: the figure, the target, and whether it was reached."""
    return [
        f"  {name:<28}{figure:10.4g}   target {target!s:<15}"
        + ("reached" if target.reached(figure) else "missed")
        for name, figure in metrics.items()
        if (target := TARGETS.get(name))
    ]
