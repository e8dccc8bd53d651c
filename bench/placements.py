"""The table of the diffusers guide for this machine's devices: one model under every placement.

Each placement runs in its own processes, launched as torchrun would, with one torch thread each.
The model is a random Flux with a denoising step of about a second on one core. All placements run
the same guided requests, two rows per forward pass, so that cfg has something to divide. Memory is
a process's peak after loading; on the CPU, without what the libraries took before loading.

`python -m bench.placements FOLDER NAME DEVICE` is one of those processes.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import serving
from bench.models import Regime, build, requests
from bench.report import Metrics
from jobs.catalog import Model, load_catalog
from pipelines.load import dismiss, load_follower, load_pipeline
from pipelines.seam import Pipeline, Sample

REGIME = Regime("sharded", side=256, heads=48, double_blocks=2, single_blocks=4)

STEPS = 4
"""Denoising steps of every sample in a round."""

ROUNDS = 5

GUIDANCE = 3.0

SECONDS = 600
"""Time limit of one placement, including its processes' imports."""

PLACEMENTS: Mapping[str, Mapping[str, Any]] = {
    "replica": {},
    "ulysses 2": {"placement": "context_parallel", "ulysses": 2},
    "ring 2": {"placement": "context_parallel", "ring": 2},
    "unified 2x2": {"placement": "context_parallel", "ring": 2, "ulysses": 2},
    "cfg 2": {"placement": "context_parallel", "cfg": 2},
    "tensor 2": {"placement": "context_parallel", "tensor": 2},
    "pipelined 2, 1 in flight": {"placement": "pipelined", "stages": 2, "chunks": 1},
    "pipelined 2, 2 in flight": {"placement": "pipelined", "stages": 2, "chunks": 2},
    "split": {"placement": "split", "unload": True},
}
"""A row of the table -> the fields of its catalog entry."""


def run() -> Metrics:
    """Run every placement that has enough devices, and print the table."""
    with serving.folder() as folder:
        build(REGIME, folder)
        return _table(folder)


def _table(folder: Path) -> Metrics:
    _head()
    metrics: Metrics = {}
    base = 0.0
    for name, fields in PLACEMENTS.items():
        model = _model(folder, fields)
        short = _too_few(model.ranks)
        try:
            seen = {} if short else _launch(folder, name, model.ranks)
        except RuntimeError as error:
            short = str(error)
        if short:
            print(f"  {name:<26}{short}", flush=True)
            continue
        figures = _figures(seen)
        base = base or figures["steps_per_second"]
        _row(name, seen, figures, base)
        key = name.replace(",", "").replace(" ", "_")
        metrics |= {f"{key}_{figure}": value for figure, value in figures.items()}
        metrics[f"{key}_against_replica"] = figures["steps_per_second"] / base
    return metrics


def _head() -> None:
    accelerator = torch.accelerator.current_accelerator()
    where = f"{torch.accelerator.device_count()} x {accelerator.type}" if accelerator else "CPU"
    print(f"\nPlacements of one model ({REGIME.side}x{REGIME.side}, guided), on {where}")
    if accelerator is None:
        print(
            f"  All processes share {os.cpu_count()} cores with everything else that runs: a "
            "speedup here says little about one on several devices"
        )
    print(f"  {'':<26}{'ms/iteration':>14}{'':>20}{'steps/s':>10}{'':>9}{'MB per process':>16}")


def _row(name: str, seen: Mapping[str, Any], figures: Metrics, base: float) -> None:
    milliseconds = [1000 * seconds for seconds in seen["seconds"]]
    spread = f"({min(milliseconds):.0f}..{max(milliseconds):.0f})"
    rate = figures["steps_per_second"]
    memory = " + ".join(f"{bytes_ / 1e6:.0f}" for bytes_ in seen["memory"])
    print(
        f"  {name:<26}{figures['milliseconds']:>14.0f}{spread:>20}{rate:>10.2f}"
        f"{rate / base:>8.2f}x{memory:>16}",
        flush=True,
    )


def _figures(seen: Mapping[str, Any]) -> Metrics:
    middle = statistics.median(seen["seconds"])
    return {
        "milliseconds": 1000 * middle,
        "steps_per_second": seen["in_flight"] / middle,
        "peak_megabytes": max(seen["memory"]) / 1e6,
    }


def _too_few(ranks: int) -> str:
    """Why that many ranks can't run here, or "" if they can."""
    devices = torch.accelerator.device_count() or os.cpu_count() or 1
    return f"needs {ranks} devices or cores, but there are {devices}" if ranks > devices else ""


def _launch(folder: Path, name: str, ranks: int) -> dict[str, Any]:
    """The measurements of the placement's processes. Raises RuntimeError with the reason."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    running = []
    for rank, log in enumerate(logs):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {variable: str(value) for variable, value in places.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        with log.open("w") as output:
            command = [sys.executable, "-m", "bench.placements", str(folder), name]
            running.append(
                subprocess.Popen(
                    command, env=os.environ | environment, stdout=output, stderr=output
                )
            )
    try:
        codes = [process.wait(SECONDS) for process in running]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {SECONDS} seconds") from None
    finally:
        for process in running:
            process.kill()
            process.wait()
    for code, log in zip(codes, logs, strict=True):
        if code:
            raise RuntimeError(f"failed: {log.read_text().strip().splitlines()[-1]}")
    parts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {**parts[0], "memory": [part["memory"] for part in parts]}


def _model(folder: Path, fields: Mapping[str, Any]) -> Model:
    return replace(load_catalog(folder / "models.toml").get(REGIME.name), **fields)


def main(folder: Path, name: str) -> None:
    """One process of a placement: load, take part, write the measurements."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    model = _model(folder, PLACEMENTS[name])
    accelerator = torch.accelerator.current_accelerator()
    device = f"{accelerator.type}:{rank}" if accelerator else "cpu"
    peak = _Peak(device)
    seen: dict[str, Any] = {}
    if rank:
        follower = load_follower(model, device)
        peak.from_here()
        follower.run()
    else:
        pipeline = load_pipeline(model, device)
        peak.from_here()
        seen = {"seconds": _measured(pipeline, model), "in_flight": pipeline.in_flight}
    seen["memory"] = peak.bytes()
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    if not rank:
        dismiss(pipeline)


def _measured(pipeline: Pipeline, model: Model) -> list[float]:
    """Seconds of a denoising step, round by round, with as many samples as can be in flight."""
    asked = requests(model, pipeline.in_flight, seed=0, steps=[STEPS * ROUNDS + 1])
    asked = [replace(request, guidance_scale=GUIDANCE) for request in asked]
    conditionings = pipeline.encode(asked)
    samples = [pipeline.start(*pair) for pair in zip(asked, conditionings, strict=True)]
    for sample in samples:
        pipeline.step([sample])
    return [_seconds(pipeline, samples) for _ in range(ROUNDS)]


def _seconds(pipeline: Pipeline, samples: Sequence[Sample]) -> float:
    def advance(sample: Sample) -> None:
        for _ in range(STEPS):
            pipeline.step([sample])

    threads = [threading.Thread(target=advance, args=(sample,)) for sample in samples]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (time.perf_counter() - started) / STEPS


class _Peak:
    """The peak memory of this process on its device since `from_here`."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.libraries = 0 if self.device.type != "cpu" else _resident("VmRSS")

    def from_here(self) -> None:
        """Start counting from the current use, without what loading took."""
        if self.device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.accelerator.reset_peak_memory_stats(self.device)

    def bytes(self) -> int:
        """The peak since then."""
        if self.device.type == "cpu":
            return _resident("VmHWM") - self.libraries
        return int(torch.accelerator.max_memory_allocated(self.device))


def _resident(field: str) -> int:
    """This process's resident bytes, as Linux counts them: now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
