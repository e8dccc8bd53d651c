"""Images per second under a full backlog: our engine compared with one at a time.

Also the useful share of the device's arithmetic: the floating-point operations of the finished
images, divided by those of a large matrix product in the same time. Each round runs all contenders
in turn on the same requests.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bench.models import LARGE, SMALL, Regime, device, loaded, measured, requests
from bench.policies import Arrival, one_at_a_time, stepwise
from bench.report import Metrics, table
from jobs.request import ImageRequest
from pipelines.seam import Pipeline
from workers.scheduler import Costs

STEPS = (20,)


def images_per_second(
    pipeline: Pipeline, costs: Costs, workload: Sequence[ImageRequest], *, ours: bool
) -> float:
    """Images per second when all requests arrive at once, until the last is decoded."""
    trace = [Arrival(0.0, request) for request in workload]
    return len(trace) / max((stepwise if ours else one_at_a_time)(pipeline, costs, trace))


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of `run`: matrix products, convolutions and attention.

    Attention on the CPU counts as on an accelerator, by torch's own formula, because torch has no
    formula for the CPU's kernel.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops}) as counter:
        run()
    return int(counter.get_total_flops())


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def useful_share(
    pipeline: Pipeline, dtype: torch.dtype, workload: Sequence[ImageRequest], rate: float
) -> float:
    """FLOP/s of the finished images divided by the device's measured matrix peak."""
    request = workload[0]

    def one_image() -> None:
        [conditioning] = pipeline.encode([request])
        sample = pipeline.start(request, conditioning)
        while not sample.done:
            pipeline.step([sample], 1)
        pipeline.decode([sample])

    return flops(one_image) * rate / matrix_peak(dtype)


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on the benchmark's device, best of several."""
    side = 8192 if torch.accelerator.is_available() else 1536
    a = torch.randn(side, side, device=device(), dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, a)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def compare(regime: Regime, rounds: int, count: int) -> Metrics:
    """Run interleaved rounds of both contenders, and of the reproducible class."""
    pipeline, model = loaded(regime)
    costs = measured(pipeline, model)
    rates: dict[str, list[float]] = {}
    for seed in range(rounds):
        fast = requests(model, count, seed, STEPS)
        pinned = requests(model, count, seed, STEPS, reproducible=True)
        for name, workload, ours in (
            ("one at a time", fast, False),
            ("ours, reproducible", pinned, True),
            ("ours, fast", fast, True),
        ):
            rate = images_per_second(pipeline, costs, workload, ours=ours)
            rates.setdefault(name, []).append(rate)
    base = rates["one at a time"]
    ratios = {
        name: statistics.median(r / b for r, b in zip(figures, base, strict=True))
        for name, figures in rates.items()
    }
    table(
        f"saturated, {regime.name} regime (images/s; median, min..max)",
        [(name, figures, ratios[name]) for name, figures in rates.items()],
    )
    dtype = getattr(torch, model.dtype)
    share = useful_share(pipeline, dtype, fast, statistics.median(rates["ours, fast"]))
    return {
        f"saturated_{regime.name}": ratios["ours, fast"],
        f"saturated_{regime.name}_reproducible": ratios["ours, reproducible"],
        f"useful_flops_share_{regime.name}": share,
    }


def run(rounds: int = 5, count: int = 96) -> Metrics:
    """Both regimes."""
    metrics = compare(SMALL, rounds, count) | compare(LARGE, rounds, count // 8)
    metrics["useful_flops_share"] = metrics["useful_flops_share_large"]
    return metrics
