"""One process of a list that `split_between_processes` cut in shares, as accelerate's guide shows.

Started once for each process of the comparison, by `bench/makespan.py`, with the variables of a
launcher. Loads the model, then takes a line of JSON for each run from its standard input:

    {"how": "loop" | "engine", "padding": bool, "folder": PATH, "requests": [REQUEST...]}

`loop` is the guide's program: a diffusers pipeline, called for one prompt after the other. `engine`
runs the same share through imagemill's engine, so that what batching gains and what sharing the
queue gains can be told apart. Answers with the seconds from a common start to its last image.
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
    """Serve runs until the standard input ends."""
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
        wanted = [ImageRequest(**fields) for fields in run["requests"]]
        state.wait_for_everyone()
        started = time.perf_counter()
        with state.split_between_processes(wanted, apply_padding=run["padding"]) as share:
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
