"""A skewed list of prompts on two processes: workers on one queue, against accelerate's split.

The list consists of clumps with the same size and steps, as real lists do: a few posters, many
thumbnails. `split_between_processes` cuts it in two halves; our workers take as much as they can
hold from one queue. The makespan is the time from the common start until the last image is a file.
Everything is loaded and warmed up first, rounds are interleaved, and each seed makes another list.

    split                 the guide's loop: one diffusers call after the other in each process
    split, padded         the same with apply_padding=True
    split, our engine     the same cut, each share through our engine: what batching gains
    ours                  two replica workers on the queue, every image committed
    ours, shuffled        both on the list in random order, which suits the split best
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import serving
from bench.models import LARGE, build
from bench.report import Metrics, table
from jobs.catalog import Model
from jobs.queue.store import Store
from jobs.request import ImageRequest
from jobs.runtime import lifeline
from workers.process.supervisor import held_port

PROCESSES = 2
SIDES, STEPS, CLUMP = (64, 128, 192), (4, 12, 28), (2, 6)
"""A clump's random choices: the images' side in pixels, their steps, and their number."""

HOW: dict[str, tuple[str, bool]] = {
    "split": ("loop", False),
    "split, padded": ("loop", True),
    "split, our engine": ("engine", False),
}


def run(seeds: Sequence[int] = (1, 2, 3), rounds: int = 1, count: int = 60) -> Metrics:
    """Run every contender on every list."""
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(serving.folder())
        model = build(LARGE, folder)
        models, data = folder / "models.toml", folder / "data"
        data.mkdir()
        store = stack.enter_context(serving.workers(data, models, model.name, PROCESSES))
        splits = stack.enter_context(_splits(folder, model))
        for seed in [seed for seed in seeds for _ in range(rounds)]:
            workload = skewed(model, count, seed)
            for name, (how, padding) in HOW.items():
                elapsed = _split(splits, folder, workload, how, padding=padding)
                seconds.setdefault(name, []).append(elapsed)
            seconds.setdefault("ours", []).append(_ours(store, workload))
            random.Random(seed).shuffle(workload)
            elapsed = _split(splits, folder, workload, "loop", padding=False)
            seconds.setdefault("split, shuffled", []).append(elapsed)
            seconds.setdefault("ours, shuffled", []).append(_ours(store, workload))
    base = seconds["split"]
    table(
        f"makespan of {count} images over {PROCESSES} processes (seconds; median, min..max)",
        [(name, figures, _ratio(base, figures)) for name, figures in seconds.items()],
    )
    return {
        "makespan_vs_split": _ratio(base, seconds["ours"]),
        "makespan_vs_split_padded": _ratio(seconds["split, padded"], seconds["ours"]),
        "makespan_vs_split_engine": _ratio(seconds["split, our engine"], seconds["ours"]),
        "makespan_vs_split_shuffled": _ratio(seconds["split, shuffled"], seconds["ours, shuffled"]),
    }


def skewed(model: Model, count: int, seed: int) -> list[ImageRequest]:
    """`count` requests in clumps of one size and steps each."""
    draw = random.Random(seed)
    workload: list[ImageRequest] = []
    while len(workload) < count:
        side, steps = draw.choice(SIDES), draw.choice(STEPS)
        for _ in range(min(draw.randint(*CLUMP), count - len(workload))):
            number = len(workload)
            workload.append(
                ImageRequest(
                    model=model.name,
                    prompt=f"a drawing, number {number % 8}",
                    seed=number,
                    width=side,
                    height=side,
                    steps=steps,
                    guidance_scale=1.0,
                    reproducible=False,
                )
            )
    return workload


def _ratio(base: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(base, ours, strict=True))


def _ours(store: Store, workload: Sequence[ImageRequest]) -> float:
    started = time.perf_counter()
    submitted = store.submit(
        workload,
        tenant="bench",
        priority=5,
        metadata={},
        spec={},
        quota=100_000,
        keep_seconds=600,
        max_attempts=1,
    )
    serving.until(lambda: store.job(submitted.job_id, None).state.finished, pause=0.02)
    took = time.perf_counter() - started
    if store.job(submitted.job_id, None).counts.succeeded != len(workload):
        raise RuntimeError("a benchmark's image failed")
    return took


@contextmanager
def _splits(folder: Path, model: Model) -> Iterator[list[subprocess.Popen[Any]]]:
    """The processes of the static split, loaded and waiting for a list."""
    with held_port() as port:
        launched = {
            **os.environ,
            "WORLD_SIZE": str(PROCESSES),
            "LOCAL_WORLD_SIZE": str(PROCESSES),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
        }
        argv = [sys.executable, "-m", "bench.static_split", str(folder / "models.toml")]
        processes = [
            lifeline.spawn(
                [*argv, model.name, str(folder / "data")],
                env={**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(PROCESSES)
        ]
        try:
            for process in processes:
                _answer(process, "ready")
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def _split(
    processes: list[subprocess.Popen[Any]],
    folder: Path,
    workload: Sequence[ImageRequest],
    how: str,
    *,
    padding: bool,
) -> float:
    """Seconds until the last process has finished its share."""
    requests = [asdict(request) for request in workload]
    run = {"how": how, "padding": padding, "folder": str(folder), "requests": requests}
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(json.dumps(run) + "\n")
        process.stdin.flush()
    return max(float(_answer(process)) for process in processes)


def _answer(process: subprocess.Popen[Any], expected: str | None = None) -> str:
    """The process's next answer; other lines, printed by libraries, are skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        word = str(line).strip()
        if expected is not None and word == expected:
            return word
        if expected is None and word.replace(".", "", 1).replace("e-", "", 1).isdecimal():
            return word
    raise RuntimeError("a process of the static split died")
