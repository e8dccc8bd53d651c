"""Which pipeline classes of diffusers can be called whole for an image, told from the class alone.

A call gets a prompt and a size, so a class that needs more, such as a picture, is refused before
its weights are loaded. A signature says what a class takes, and not what it can do without: the
tables here hold that, and a test over all classes of diffusers keeps them true. A class that makes
videos is asked for one frame.
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
"""Arguments of pipelines that are pictures or videos."""

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
"""Classes that take pictures and make images without them as well."""

ALSO_NEEDED = {
    "StableDiffusionGLIGENPipeline": ("gligen_phrases", "gligen_boxes"),
    "StableDiffusionGLIGENTextImagePipeline": ("gligen_phrases", "gligen_boxes"),
    "StableDiffusionPix2PixZeroPipeline": ("source_embeds", "target_embeds"),
}
"""Arguments with a default that their class refuses."""

NEGATIVE_NEEDED = frozenset({"EasyAnimatePipeline"})
"""Classes that fail without a negative prompt, so that they get an empty one."""

MISCALLING = frozenset({"StableDiffusionParadigmsPipeline"})
"""Classes that call a step callback wrongly and fail, so that it isn't passed to them."""

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
"""Classes that make videos and can't make one of a single frame."""

FRAMES = ("num_frames", "video_length", "frames")
"""Arguments that say how long a video is."""


def frames_argument(pipeline: type) -> str | None:
    """The argument by which a class that makes videos is asked for one frame; None for others."""
    return next((name for name in FRAMES if name in _parameters(pipeline)), None)


def refusal(pipeline: type) -> str | None:
    """The sentence that says why images can't be made with a class; None if they can."""
    taken = _parameters(pipeline)
    if pipeline.__name__ in NO_SINGLE_FRAME:
        return f"{pipeline.__name__} makes videos, and can't make a single frame"
    if pipeline.__name__ in PRIORS:
        return f"{pipeline.__name__} makes embeddings for another pipeline, not images"
    lacking = [name for name in ("prompt", "width", "height") if name not in taken]
    needed = _needed(pipeline.__name__, taken)
    if not lacking and not needed:
        return None
    return (
        f"{pipeline.__name__} does not make images from a prompt and a size alone"
        + (f"; it takes no {', '.join(lacking)}" if lacking else "")
        + (f"; it needs {', '.join(needed)}" if needed else "")
    )


def _needed(name: str, taken: dict[str, inspect.Parameter]) -> list[str]:
    """Arguments besides the prompt that a call can't do without."""
    optional = name in WITHOUT_PICTURES
    return [
        argument
        for argument, parameter in taken.items()
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
