"""The comparison that every class of diffusers goes through: served against the class itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import is_torchvision_available

from jobs.errors import ModelUnavailable
from jobs.request import ImageRequest
from pipelines.draws import Draws
from pipelines.families.whole_call import WholeCall
from pipelines.families.whole_classes import frames_argument
from pipelines.loading.packages import missing_packages
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.serving import ask, begin

FLAT = 2.0
"""Standard deviation, in steps of 1/255, below which a picture shows nothing."""


def served(pipe: Any, request: ImageRequest) -> np.ndarray:
    """The picture that the whole-call family makes, as bytes [height, width, 3]."""
    pipeline = FamilyPipeline(WholeCall(pipe))
    sample = begin(pipeline, request)
    pipeline.step([sample], 1)
    assert sample.error is None, sample.error
    [pixels] = pipeline.decode([sample])
    return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def own(pipe: Any, request: ImageRequest, **arguments: Any) -> np.ndarray:
    """The picture that the class makes by itself, asked for PIL images with one generator.

    What it draws from torch's global generator is seeded as the family seeds it.
    """
    taken = WholeCall(pipe).takes
    asked = {
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.steps,
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "pil",
        "use_resolution_binning": False,
        "max_area": request.width * request.height,
        "guidance_scale": request.guidance_scale,
        "guidance_schedule": None,
        **({frames: 1} if (frames := frames_argument(type(pipe))) else {}),
    }
    if "true_cfg_scale" in taken:
        config = getattr(getattr(pipe, "transformer", None), "config", {})
        if not config.get("guidance_embeds"):
            asked |= {"true_cfg_scale": asked.pop("guidance_scale"), "negative_prompt": ""}
    if type(pipe).__name__ == "EasyAnimatePipeline":
        asked["negative_prompt"] = ""  # it fails without one
    asked = {name: value for name, value in asked.items() if name in taken}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Draws(request.seed).seed)
        output = pipe(prompt=request.prompt, **(asked | arguments))
    for name in ("images", "image", "frames", "rgb"):
        if (held := getattr(output, name, None)) is not None:
            break
    picture = held[0][0] if isinstance(held[0], list) else held[0]
    return np.asarray(picture)


ARRAYS = {
    "StableDiffusionLDM3DPipeline": "Pillow 13 has no mode argument, by which it makes depth maps",
    "TextToVideoZeroPipeline": "it returns arrays whatever it is asked for",
}
"""Classes that can't return PIL images here, compared with their arrays, and why they can't."""

TORCHVISION = frozenset(
    {"Cosmos2TextToImagePipeline", "CosmosTextToWorldPipeline", "OmniGenPipeline"}
)
"""Classes that can't run without torchvision, which has no build for every torch."""

SIZES = {"StableCascadeCombinedPipeline": 128, "WuerstchenCombinedPipeline": 128}
"""Sides in pixels, where 64 isn't possible."""


STEPS = {"TextToVideoZeroPipeline": 48, "TextToVideoZeroSDXLPipeline": 48}
"""Steps, where 2 aren't possible."""


def check_class(name: str, build: Callable[[], Any]) -> None:
    """The comparison for a class; where its package is missing, the sentence that says so."""
    if name not in TORCHVISION or is_torchvision_available():
        check(build())
        return
    with pytest.raises((NameError, ModelUnavailable)) as caught:
        served(build(), ask(steps=2))
    error = caught.value
    sentence = missing_packages(error) if isinstance(error, NameError) else str(error)
    assert "needs torchvision: `pip install 'imagemill[vision]'`" in str(sentence)


def check(pipe: Any) -> None:
    """Served twice, both times the class's own picture bit by bit, and a picture of something."""
    side = SIZES.get(type(pipe).__name__, 64)
    steps = STEPS.get(type(pipe).__name__, 2)
    request = ask(seed=3, steps=steps, width=side, height=side)
    if type(pipe).__name__ in ARRAYS:
        expected = (own(pipe, request, output_type="np") * 255).round().astype("uint8")
    else:
        expected = own(pipe, request)
    assert expected.std() > FLAT, "the tiny model paints nothing, so that nothing is compared"
    for _ in range(2):
        assert np.array_equal(served(pipe, request), expected)
