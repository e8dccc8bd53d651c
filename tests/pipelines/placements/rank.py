"""One rank of a group with tiny models.

A plan lists cases, each a catalog entry and what to do with it. Every rank runs all of them and
writes its results next to the plan.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jobs.catalog import Defaults
from jobs.errors import ImagemillError
from pipelines.load import dismiss, load_follower, load_pipeline
from pipelines.placements import context_parallel, diffusers_patches, group
from tests.pipelines.placements.launch import NEVER
from tests.pipelines.rounding import Reference
from tests.pipelines.serving import ask, begin, entry, serve
from tests.pipelines.test_families import CASES, Case, true_cfg
from tests.pipelines.tiny import load_tiny
from tests.waiting import PATIENCE

FAMILIES = {
    "Flux": Case("Flux", "flux", true_cfg, 16),
    "Flux2": CASES["Flux2"],
    "Flux2Klein": CASES["Flux2Klein"],
    "Chroma": CASES["Chroma"],
    "QwenImage": CASES["QwenImage"],
    "ZImage": CASES["ZImage"],
}
OTHER = Case("", "", true_cfg, 16)

Plain = dict[Any, Any]
"""diffusers' pipelines by folder, and their images by folder, request and dtype."""


def main(file: str) -> None:
    path = Path(file)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # so that float32 is float32 on a GPU too
    plan = json.loads(path.read_text())
    rank = int(os.environ["RANK"])
    group.GRACE_SECONDS = PATIENCE
    results: dict[str, Any] = {}
    plain: Plain = {}
    for case in plan["cases"]:
        os.environ["MASTER_PORT"] = str(case["port"])
        group.GROUP_SECONDS = case.get("group_seconds", NEVER)
        try:
            with sabotaged(case):
                results[case["name"]] = lead(case, plain) if rank == 0 else follow(case)
        except ImagemillError as error:
            results[case["name"]] = {"error": type(error).__name__, "message": str(error)}
    path.with_name(f"rank{rank}.json").write_text(json.dumps(results))


def model(case: dict[str, Any]) -> Any:
    length = FAMILIES.get(case["family"], OTHER).length
    fields = {"defaults": Defaults(64, 64, 2, 3.5), "max_sequence_length": length}
    fields["placement"] = "context_parallel"
    return entry(case["folder"], **(fields | case["entry"]))


def device(case: dict[str, Any]) -> str:
    """The rank's own device, of the case's kind."""
    kind: str = case.get("device", "cpu")
    return kind if kind == "cpu" else f"{kind}:{os.environ['RANK']}"


def follow(case: dict[str, Any]) -> dict[str, Any]:
    follower = load_follower(model(case), device(case))
    if case.get("sabotage") == "weights":
        with torch.no_grad():
            next(follower.transformer.parameters()).add_(1.0)
    if case.get("sabotage") == "code":
        follower.transformer.forward = None
    follower.run()
    return {}


def lead(case: dict[str, Any], plain: Plain) -> dict[str, Any]:
    """Serve the case's requests, some joining midway, and compare with diffusers' images."""
    pipeline = load_pipeline(model(case), device(case))
    try:
        return serve_all(case, pipeline, plain)
    finally:
        dismiss(pipeline)
        dismiss(pipeline)


@contextmanager
def sabotaged(case: dict[str, Any]) -> Iterator[None]:
    """Lose masks or remove a kernel's package on every rank, if the case says so."""
    mask, backend = diffusers_patches.with_mask, context_parallel.set_backend
    if case.get("sabotage") == "masks":
        diffusers_patches.with_mask = unmasked
    if case.get("sabotage") == "kernel":
        context_parallel.set_backend = without_package
    try:
        yield
    finally:
        diffusers_patches.with_mask, context_parallel.set_backend = mask, backend


def without_package(*_: Any) -> None:
    """What diffusers does if a backend's package isn't installed."""
    raise ImportError("no such package")


def unmasked(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> Any:
    """What a ring does without our patch: ignore the mask."""
    wider = (0, diffusers_patches.EXTRA)
    return torch.nn.functional.pad(query, wider), torch.nn.functional.pad(key, wider)


def serve_all(case: dict[str, Any], pipeline: Any, plain: Plain) -> dict[str, Any]:
    time.sleep(case.get("pause", 0))
    refused = {}
    for request in [ask(**fields) for fields in case.get("refused", [])]:
        try:
            begin(pipeline, request)
        except ImagemillError as error:
            refused[request.seed] = f"{type(error).__name__}: {error}"
    requests = [ask(**fields) for fields in case["requests"]]
    arrivals = {0: requests[:1], 1: requests[1:3], 2: requests[3:]}
    pictures, forwards = serve(pipeline, arrivals, largest=4, bucket=case.get("bucket", 0))
    misses = {
        request.seed: reference(case, request, plain).miss(pictures[request.seed])
        for request in requests
    }
    return {"refused": refused, "forwards": forwards, "misses": misses}


def reference(case: dict[str, Any], request: Any, plain: Plain) -> Reference:
    """diffusers' own image in float32 on the CPU, made once for all cases of a family."""
    folder, dtype = case["folder"], getattr(torch, case["entry"].get("dtype", "float32"))
    if folder not in plain:
        plain[folder] = load_tiny(Path(folder))
        plain[folder].set_progress_bar_config(disable=True)
    key = (folder, request, dtype)
    if key not in plain:
        plain[key] = FAMILIES[case["family"]].reference(plain[folder], request, dtype)
    return plain[key]
