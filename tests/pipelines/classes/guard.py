"""Compare the served picture with that of the diffusers class itself."""

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
"""Standard deviation, in steps of 1/255, below which a picture counts as blank."""


def served(pipe: Any, request: ImageRequest) -> np.ndarray:
    """The picture that the whole-call family makes, as bytes [height, width, 3]."""
    pipeline = FamilyPipeline(WholeCall(pipe))
    sample = begin(pipeline, request)
    pipeline.step([sample], 1)
    assert sample.error is None, sample.error
    [pixels] = pipeline.decode([sample])
    return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def own(pipe: Any, request: ImageRequest, **arguments: Any) -> np.ndarray:
    """The picture that the class itself makes, with output as PIL images and one generator.

    Draws from torch's global generator are seeded like the family does.
    """
    parameters = WholeCall(pipe).takes
    defaults = {
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
    if "true_cfg_scale" in parameters:
        config = getattr(getattr(pipe, "transformer", None), "config", {})
        if not config.get("guidance_embeds"):
            defaults |= {"true_cfg_scale": defaults.pop("guidance_scale"), "negative_prompt": ""}
    if type(pipe).__name__ == "EasyAnimatePipeline":
        defaults["negative_prompt"] = ""  # fails without it
    defaults = {name: value for name, value in defaults.items() if name in parameters}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Draws(request.seed).seed)
        output = pipe(prompt=request.prompt, **(defaults | arguments))
    for name in ("images", "image", "frames", "rgb"):
        if (held := getattr(output, name, None)) is not None:
            break
    picture = held[0][0] if isinstance(held[0], list) else held[0]
    return np.asarray(picture)


ARRAYS = {
    "StableDiffusionLDM3DPipeline": "its depth maps need the mode argument that Pillow 13 removed",
    "TextToVideoZeroPipeline": "it always returns arrays",
}
"""Classes that can't return PIL images here, so arrays are compared, and the reason."""

TORCHVISION = frozenset(
    {"Cosmos2TextToImagePipeline", "CosmosTextToWorldPipeline", "OmniGenPipeline"}
)
"""Classes that can't run without torchvision, which isn't available for every torch."""

SIZES = {"StableCascadeCombinedPipeline": 128, "WuerstchenCombinedPipeline": 128}
"""Side in pixels for classes that don't support 64."""


STEPS = {"TextToVideoZeroPipeline": 48, "TextToVideoZeroSDXLPipeline": 48}
"""Steps for classes that don't support 2."""


def check_class(name: str, build: Callable[[], Any]) -> None:
    """Run the comparison for a class, or check the error if its package is missing."""
    if name not in TORCHVISION or is_torchvision_available():
        check(build())
        return
    with pytest.raises((NameError, ModelUnavailable)) as caught:
        served(build(), ask(steps=2))
    error = caught.value
    sentence = missing_packages(error) if isinstance(error, NameError) else str(error)
    assert "needs torchvision: `pip install 'imagemill[vision]'`" in str(sentence)


def check(pipe: Any) -> None:
    """Serve twice; both pictures must equal the class's own bit for bit and not be blank."""
    side = SIZES.get(type(pipe).__name__, 64)
    steps = STEPS.get(type(pipe).__name__, 2)
    request = ask(seed=3, steps=steps, width=side, height=side)
    if type(pipe).__name__ in ARRAYS:
        expected = (own(pipe, request, output_type="np") * 255).round().astype("uint8")
    else:
        expected = own(pipe, request)
    assert expected.std() > FLAT, (
        "the tiny model's picture is blank, so the comparison is meaningless"
    )
    for _ in range(2):
        assert np.array_equal(served(pipe, request), expected)
