"""`python -m bench [--quick] [NAME ...]`: run the benchmarks one after the other.

As soon as a benchmark is done, it prints its table, a line for every figure with a target, and one
JSON line for programs. All JSON lines are printed again at the end. A benchmark that raises is
reported, and the others still run. With `--quick`, only the benchmarks with a short form run, in
that form.
"""

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch

from bench import (
    converge,
    eta,
    fairness,
    goodput,
    makespan,
    order,
    peers,
    placements,
    saturated,
    served,
    submits,
)
from bench.report import Metrics, json_line
from bench.targets import verdicts

BENCHES: dict[str, Callable[[], Metrics]] = {
    "saturated": saturated.run,
    "goodput": goodput.run,
    "served": served.run,
    "peers": peers.run,
    "submits": submits.run,
    "eta": eta.run,
    "fairness": fairness.run,
    "order": order.run,
    "converge": converge.run,
    "placements": placements.run,
    "makespan": makespan.run,
}

SHORT: dict[str, Callable[[], Metrics]] = {"peers": peers.quick}
"""Short forms for `--quick`, which show that a benchmark works."""


def main(
    arguments: Sequence[str], benches: Mapping[str, Callable[[], Metrics]] | None = None
) -> int:
    """Run the named benchmarks, or all; 1 if one of them raised, 2 for an unknown name."""
    if benches is None:
        benches = SHORT if "--quick" in arguments else BENCHES
    names = [name for name in arguments if name != "--quick"] or list(benches)
    unknown = [name for name in names if name not in benches]
    if unknown:
        sys.stderr.write(f"no benchmark {', '.join(unknown)}; there are {', '.join(benches)}\n")
        return 2
    results: dict[str, Metrics] = {}
    for name in names:
        try:
            results[name] = benches[name]()
        except Exception:
            sys.stderr.write(f"\n{name} failed:\n{traceback.format_exc()}")
        else:
            print("\n".join(["", *verdicts(results[name])]))
            json_line(name, results[name])
    failed = [name for name in names if name not in results]
    print(f"\nfailed: {', '.join(failed)}" if failed else "")
    for name, metrics in results.items():
        json_line(name, metrics)
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
