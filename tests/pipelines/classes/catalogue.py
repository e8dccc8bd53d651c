"""All pipeline classes of the installed diffusers, and what is known of each."""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import diffusers

from pipelines.families import whole_classes

_PROCESSOR = "its processor needs torchvision"
_SOUND = "it makes sound beside its frames, with a vocoder, which is not made here"
_FILE = "its tokenizer reads a file of ChatGLM's, which is not made here"

UNBUILT = {
    "BriaFibo2Pipeline": _PROCESSOR,
    "Cosmos2_5_PredictBasePipeline": "it needs torchvision",
    "Cosmos3OmniPipeline": "it needs torchvision",
    "DreamLiteMobilePipeline": _PROCESSOR,
    "DreamLitePipeline": _PROCESSOR,
    "Flux2Pipeline": "its text encoder is a Mistral 3 with vision, which is not made here",
    "GlmImagePipeline": "its prior and its processor are not made here",
    "Kandinsky5T2IPipeline": _PROCESSOR,
    "Kandinsky5T2VPipeline": _PROCESSOR,
    "KolorsPAGPipeline": _FILE,
    "KolorsPipeline": _FILE,
    "LTX2ConditionPipeline": _SOUND,
    "LTX2DFRPipeline": _SOUND,
    "LTX2DFRTemporalRefinePipeline": _SOUND,
    "LTX2HDRPipeline": _SOUND,
    "LTX2InContextPipeline": _SOUND,
    "LTX2Pipeline": _SOUND,
    "LongCatImagePipeline": _PROCESSOR,
    "NucleusMoEImagePipeline": _PROCESSOR,
    "QwenImage21Pipeline": _PROCESSOR,
    "UniDiffuserPipeline": "its nine components are not made here",
}
"""Classes that are served and have no tiny pipeline here, and why."""


@cache
def pipelines() -> dict[str, Any]:
    """Name -> class, of every pipeline that diffusers exports and can import here."""
    classes = {name: getattr(diffusers, name, None) for name in dir(diffusers)}
    return {
        name: one
        for name, one in sorted(classes.items())
        if inspect.isclass(one)
        and issubclass(one, diffusers.DiffusionPipeline)
        and one is not diffusers.DiffusionPipeline
    }


def built() -> set[str]:
    """Classes of which a tiny pipeline is compared with what is served."""
    from tests.pipelines.classes import (
        more_transformers,
        more_videos,
        transformers,
        unets,
        videos,
    )

    modules = (unets, transformers, more_transformers, videos, more_videos)
    return {name for module in modules for name in module.BUILDERS}


def tables() -> list[Iterable[str]]:
    """The lists of class names that the product keeps."""
    return [
        whole_classes.WITHOUT_PICTURES,
        whole_classes.ALSO_NEEDED,
        whole_classes.NEGATIVE_NEEDED,
        whole_classes.MISCALLING,
        whole_classes.NO_SINGLE_FRAME,
        whole_classes.PRIORS,
    ]
