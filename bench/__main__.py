"""`python -m bench [NAME ...]`: run the benchmarks, a table each and, last, one JSON line each."""

import sys
from collections.abc import Callable

import torch

from bench import eta, fairness, goodput, makespan, placements, saturated, served, submits
from bench.report import Metrics, json_line

BENCHES: dict[str, Callable[[], Metrics]] = {
    "saturated": saturated.run,
    "goodput": goodput.run,
    "served": served.run,
    "submits": submits.run,
    "eta": eta.run,
    "fairness": fairness.run,
    "placements": placements.run,
    "makespan": makespan.run,
}


def main() -> int:
    """Run the named benchmarks, or all; 2 for a name that there is not."""
    names = sys.argv[1:] or list(BENCHES)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        sys.stderr.write(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHES)}\n")
        return 2
    torch.set_num_threads(1)
    results = {name: BENCHES[name]() for name in names}
    for name, metrics in results.items():
        json_line(name, metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main())
