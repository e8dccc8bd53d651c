"""One process of accelerate's `split_between_processes`, written as its guide shows.

`bench/makespan.py` starts one for each process of the comparison, with a launcher's environment
variables. It loads the model, then reads a line of JSON for each run from standard input:

    {"how": "loop" | "engine", "padding": bool, "folder": PATH, "requests": [REQUEST...]}

`loop` is the guide's program: a diffusers pipeline that's called for one prompt after the other.
`engine` runs the same share through imagemill's engine, which separates the gain of batching from
the gain of sharing a queue. The answer is the seconds from the common start to the process's last
image.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from bench.policies import Arrival, stepwise
from jobs.catalog import Model, load_catalog
from jobs.request import ImageRequest
from pipelines.load import load_pipeline
from workers.profile import warm_up


def main() -> None:
    """Serve runs until standard input ends."""
    catalog, name, data = sys.argv[1:]
    model = load_catalog(Path(catalog)).get(name)
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    pipe = DiffusionPipeline.from_pretrained(model.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    ours = load_pipeline(model, "cpu")
    costs = warm_up(ours, model, "cpu", Path(data))
    print("ready", flush=True)
    for line in sys.stdin:
        run = json.loads(line)
        workload = [ImageRequest(**fields) for fields in run["requests"]]
        state.wait_for_everyone()
        started = time.perf_counter()
        with state.split_between_processes(workload, apply_padding=run["padding"]) as share:
            if run["how"] == "loop":
                _loop(pipe, model, share, Path(run["folder"]))
            else:
                stepwise(ours, costs, [Arrival(0.0, request) for request in share])
        print(time.perf_counter() - started, flush=True)


def _loop(pipe: Any, model: Model, share: list[ImageRequest], folder: Path) -> None:
    for number, request in enumerate(share):
        image = pipe(
            request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            max_sequence_length=model.max_sequence_length,
            generator=torch.Generator().manual_seed(request.seed),
        ).images[0]
        image.save(folder / f"result_{PartialState().process_index}_{number}.png")


if __name__ == "__main__":
    main()
