"""Which pipeline classes of diffusers can make an image in one call, judged by the class alone.

A call passes a prompt and a size, so a class that needs more, such as an input image, is refused
before its weights are loaded. A signature lists what a class takes, but not what it can do without.
The tables here do, and a test over all classes of diffusers checks them. Classes that make videos
are asked for a single frame.
"""

import inspect
from typing import Any

PICTURES = (
    "image",
    "images",
    "input_images",
    "mask",
    "mask_image",
    "control_image",
    "control_mask",
    "cond_image",
    "ref_image",
    "reference_images",
    "video",
    "mask_video",
    "control_video",
    "conditioning_frames",
    "gligen_images",
    "gligen_inpaint_image",
)
"""Arguments that are images or videos."""

WITHOUT_PICTURES = frozenset(
    {
        "AnyFlowPipeline",
        "BriaFibo2Pipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Cosmos3OmniPipeline",
        "DreamLiteMobilePipeline",
        "DreamLitePipeline",
        "Flux2KleinKVPipeline",
        "Flux2KleinPipeline",
        "Flux2Pipeline",
        "FluxKontextPipeline",
        "GlmImagePipeline",
        "LTXConditionPipeline",
        "OmniGenPipeline",
        "QwenImage21Pipeline",
        "StableCascadeCombinedPipeline",
        "StableDiffusionGLIGENPipeline",
        "UniDiffuserPipeline",
        "WanVACEPipeline",
        "ZImageOmniPipeline",
    }
)
"""Classes that take images as input but also work without them."""

ALSO_NEEDED = {
    "StableDiffusionGLIGENPipeline": ("gligen_phrases", "gligen_boxes"),
    "StableDiffusionGLIGENTextImagePipeline": ("gligen_phrases", "gligen_boxes"),
    "StableDiffusionPix2PixZeroPipeline": ("source_embeds", "target_embeds"),
}
"""Arguments with a default that the class itself refuses."""

NEGATIVE_NEEDED = frozenset({"EasyAnimatePipeline"})
"""Classes that fail without a negative prompt, so they get an empty one."""

MISCALLING = frozenset({"StableDiffusionParadigmsPipeline"})
"""Classes that call step callbacks with wrong arguments and fail, so they don't get one."""

PRIORS = frozenset({"StableCascadePriorPipeline", "WuerstchenPriorPipeline"})
"""Classes that make embeddings for another pipeline."""

NO_SINGLE_FRAME = frozenset(
    {
        "AllegroPipeline",
        "AnyFlowFARPipeline",
        "HeliosPipeline",
        "HeliosPyramidPipeline",
    }
)
"""Video classes that can't make a single frame."""

FRAMES = ("num_frames", "video_length", "frames")
"""Arguments that set the length of a video."""


def frames_argument(pipeline: type) -> str | None:
    """The argument that sets a video class's number of frames; None for other classes."""
    return next((name for name in FRAMES if name in _parameters(pipeline)), None)


def refusal(pipeline: type) -> str | None:
    """Why a class can't make images, as a sentence; None if it can."""
    parameters = _parameters(pipeline)
    if pipeline.__name__ in NO_SINGLE_FRAME:
        return f"{pipeline.__name__} makes videos, and can't make a single frame"
    if pipeline.__name__ in PRIORS:
        return f"{pipeline.__name__} makes embeddings for another pipeline, not images"
    lacking = [name for name in ("prompt", "width", "height") if name not in parameters]
    needed = _needed(pipeline.__name__, parameters)
    if not lacking and not needed:
        return None
    return (
        f"{pipeline.__name__} does not make images from a prompt and a size alone"
        + (f"; it takes no {', '.join(lacking)}" if lacking else "")
        + (f"; it needs {', '.join(needed)}" if needed else "")
    )


def _needed(name: str, parameters: dict[str, inspect.Parameter]) -> list[str]:
    """Arguments other than the prompt that a call requires."""
    optional = name in WITHOUT_PICTURES
    return [
        argument
        for argument, parameter in parameters.items()
        if argument != "prompt"
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and (
            parameter.default is parameter.empty
            or argument in ALSO_NEEDED.get(name, ())
            or (argument in PICTURES and not optional)
        )
    ]


def _parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(pipeline.__call__).parameters)
    parameters.pop("self", None)
    return parameters
