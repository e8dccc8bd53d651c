"""One rank of a pipelined group under test.

The plan, a JSON file, lists cases. Every rank runs all of them and writes its results next to the
plan after each case, because the last one may end it.
"""

import json
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.catalog import Defaults
from jobs.errors import ImagemillError
from pipelines.load import dismiss, load_follower, load_pipeline
from pipelines.placements import group, pipelined
from pipelines.placements.links import Links
from tests.pipelines.placements.launch import NEVER
from tests.pipelines.serving import alone, ask, begin, entry, serve
from tests.pipelines.test_families import CASES, Case, true_cfg
from tests.pipelines.tiny import load_tiny
from tests.waiting import PATIENCE, wait_until

FAMILIES = CASES | {"Flux": Case("Flux", "flux", true_cfg, 16)}

fast = partial(ask, reproducible=False)

REQUESTS = [
    fast("a red cat", seed=1, steps=5, guidance_scale=3.5, negative_prompt="ugly"),
    fast("a blue dog running on a beach at dawn", seed=2, steps=4, guidance_scale=7.0),
    fast("x", seed=3, steps=3, guidance_scale=2.0, negative_prompt="low quality, blurry"),
    fast("a wide one", seed=4, steps=3, guidance_scale=4.0, width=96),
]
ARRIVALS = {0: REQUESTS[:1], 2: REQUESTS[1:]}


def model(case: dict[str, Any]) -> Any:
    fields = {"defaults": Defaults(64, 64, 2, 3.5), "placement": "pipelined"}
    length = FAMILIES[case["family"]].length
    return entry(case["folder"], max_sequence_length=length, **fields, **case["entry"])


def lead(case: dict[str, Any]) -> dict[str, Any]:
    pipeline = load_pipeline(model(case), "cpu")
    seen = {"in_flight": pipeline.in_flight} | ACTS[case["act"]](case, pipeline)
    dismiss(pipeline)
    return seen


def compare(case: dict[str, Any], pipeline: Any) -> dict[str, Any]:
    """Requests that join midway, then in threads of their own, all compared with diffusers."""
    joined, forwards = serve(pipeline, ARRIVALS, largest=4)
    apart = at_once(pipeline, REQUESTS)
    pipe = load_tiny(Path(case["folder"]))
    pipe.set_progress_bar_config(disable=True)
    expected = {r.seed: FAMILIES[case["family"]].reference(pipe, r) for r in REQUESTS}
    return {
        "forwards": forwards,
        "joined": {seed: expected[seed].miss(joined[seed]) for seed in expected},
        "at_once": {seed: expected[seed].miss(apart[seed]) for seed in expected},
    }


def at_once(pipeline: Any, requests: list[Any]) -> dict[int, Any]:
    """Images of requests, denoised one by one in as many threads as may be in flight."""
    samples = [begin(pipeline, request) for request in requests]
    together([samples[lane :: pipeline.in_flight] for lane in range(pipeline.in_flight)], pipeline)
    return {sample.request.seed: pipeline.decode([sample])[0] for sample in samples}


def together(lanes: list[list[Any]], pipeline: Any) -> list[str]:
    """Denoise each lane's samples in its own thread; returns the errors that stopped them."""
    errors: list[str] = []

    def denoise(lane: list[Any]) -> None:
        try:
            for sample in lane:
                while not sample.done:
                    pipeline.step([sample])
        except ImagemillError as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=denoise, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


STEPS = 6
"""Forward passes of one thread in `watch`; then two threads run as many each."""


def watch(case: dict[str, Any], pipeline: Any) -> dict[str, Any]:
    """Forward passes with one thread, then with two, each noted when the first stage starts it."""
    stage = pipeline.family.pipe.transformer.stage
    forward, begun = stage.forward, Path(case["begun"])

    def noted(*args: Any, **kwargs: Any) -> Any:
        with begun.open("ab") as file:
            file.write(b".")
        return forward(*args, **kwargs)

    stage.forward = noted
    alone(pipeline, ask(steps=STEPS, guidance_scale=1.0))
    at_once(pipeline, [ask(seed=seed, steps=STEPS) for seed in (1, 2)])
    return {}


def look_ahead(stage: Any, begun: Path) -> list[int]:
    """How many passes the first stage was ahead at the end of each of this stage's passes.

    With two threads, a pass here ends only after the first stage has started the next one, so the
    test would hang if stages didn't compute at the same time. Passes of the self-check at start
    aren't counted.
    """
    ahead: list[int] = []
    forward = stage.forward

    def held(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if not begun.exists():
            return output
        number = len(ahead) + 1
        if STEPS < number < 3 * STEPS:
            wait_until(lambda: begun.stat().st_size > number)
        ahead.append(begun.stat().st_size - number)
        return output

    stage.forward = held
    return ahead


def lose(case: dict[str, Any], pipeline: Any) -> dict[str, Any]:
    """The errors of two threads when a rank dies or hangs."""
    lanes = [[begin(pipeline, ask(seed=seed, steps=1000))] for seed in (1, 2)]
    return {"seen": together(lanes, pipeline)}


def gather(case: dict[str, Any], pipeline: Any) -> dict[str, Any]:
    """The leader's output of a forward pass whose output all ranks get."""
    head = pipeline.family.pipe.transformer
    seen: list[Any] = []
    head.register_forward_hook(lambda module, args, output: seen.append(output))
    pipeline.step([begin(pipeline, ask(seed=1))])
    return {"output": digest(seen[-1])}


def digest(output: Any) -> float | None:
    """A number to compare outputs by; None without an output."""
    return None if output is None else sum(row.double().sum().item() for row in output[0])


ACTS = {"compare": compare, "watch": watch, "lose": lose, "gather": gather}


def follow(case: dict[str, Any]) -> dict[str, Any]:
    follower: Any = load_follower(model(case), "cpu")
    ahead = look_ahead(follower.stage, Path(case["begun"])) if case["act"] == "watch" else None
    if case.get("faulty") == follower.group.rank:
        spoil(follower, case)
    follower.run()
    return {"ahead": ahead, "own": follower.stage.own, "output": digest(follower.output)}


def spoil(follower: Any, case: dict[str, Any]) -> None:
    """Make the stage die, hang or fail after a few forward passes of the image."""
    count = [0]
    forward = follower.stage.forward

    def faulty(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 9:
            if case["fault"] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if case["fault"] == "fails":
                raise ValueError("a broken block")
            wait_until(lambda: follower.group.lost)
        return forward(*args, **kwargs)

    follower.stage.forward = faulty


def run(rank: int, world: int, path: Path) -> None:
    """The body of the process."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for case in json.loads(path.read_text())["cases"]:
        os.environ["MASTER_PORT"] = str(case["port"])
        group.GROUP_SECONDS = case.get("seconds", NEVER)
        group.GRACE_SECONDS = 3.0 if "seconds" in case else PATIENCE
        gathering = case["act"] == "gather"
        pipelined.Links = partial(Links, gather_output=gathering)  # type: ignore[assignment,misc]
        try:
            outcome = follow(case) if rank else lead(case)
        except ImagemillError as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
        results[case["name"]] = outcome
        path.with_name(f"rank{rank}.json").write_text(json.dumps(results))
