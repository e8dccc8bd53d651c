"""Images from the service equal those of diffusers' own pipeline, whatever else is running."""

import io

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from imagemill.client.clients import Client
from tests.end_to_end.deployment import ROOT, Deployment
from tests.waiting import PATIENCE, wait_until

REQUESTS = (
    {"prompt": "a large red circle on a white background", "seed": 11, "steps": 12},
    {"prompt": "a blue heart left of a purple triangle", "seed": 12, "steps": 8},
    {"prompt": "a small star", "seed": 13, "steps": 5, "negative_prompt": "a circle"},
    {"prompt": "a green ring above a gray cross", "seed": 14, "steps": 9, "guidance_scale": 4.0},
)


def reference(pipe: FluxPipeline, request: dict[str, object]) -> np.ndarray:
    """The image that diffusers generates for the request alone: uint8 [128, 128, 3]."""
    result = pipe(
        prompt=request["prompt"],
        negative_prompt=request.get("negative_prompt", ""),
        true_cfg_scale=request.get("guidance_scale", 2.5),
        num_inference_steps=request["steps"],
        width=128,
        height=128,
        max_sequence_length=77,
        generator=torch.Generator().manual_seed(request["seed"]),
    )
    return np.asarray(result.images[0])


def test_images_equal_diffusers_alone_and_among_others(deployment: Deployment) -> None:
    pipe = FluxPipeline.from_pretrained(ROOT / "demo" / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    expected = [reference(pipe, request) for request in REQUESTS]
    wait_until(deployment.ready_workers)
    with Client(deployment.url, patience=PATIENCE) as client:
        alone = client.submit("demo", [REQUESTS[0]]).wait(PATIENCE)
        crowd = [client.submit("demo", [REQUESTS[0]], reproducible=False)]
        for request in REQUESTS[1:]:
            wait_until(lambda: crowd[-1].refresh().counts.queued == 0)
            crowd.append(client.submit("demo", [request], reproducible=False))
        jobs = [alone, *(job.wait(PATIENCE) for job in crowd)]
        pictures = [Image.open(io.BytesIO(job.download(0))) for job in jobs]
    for picture, target in zip(pictures, [expected[0], *expected], strict=True):
        difference = np.abs(np.asarray(picture).astype(int) - target.astype(int))
        assert difference.max() <= 1
