"""All pipeline classes of the installed diffusers, and how each is tested."""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import diffusers

from pipelines.families import whole_classes

_PROCESSOR = "its processor needs torchvision"
_SOUND = "it also generates sound with a vocoder, which the tests don't build"
_FILE = "its tokenizer reads a file of ChatGLM's, which the tests don't build"

UNBUILT = {
    "BriaFibo2Pipeline": _PROCESSOR,
    "Cosmos2_5_PredictBasePipeline": "it needs torchvision",
    "Cosmos3OmniPipeline": "it needs torchvision",
    "DreamLiteMobilePipeline": _PROCESSOR,
    "DreamLitePipeline": _PROCESSOR,
    "Flux2Pipeline": "its text encoder is a Mistral 3 with vision, which the tests don't build",
    "GlmImagePipeline": "the tests don't build its prior and its processor",
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
    "UniDiffuserPipeline": "the tests don't build its nine components",
}
"""Supported classes without a tiny pipeline here, and the reason."""


@cache
def pipelines() -> dict[str, Any]:
    """Name -> class of every pipeline that diffusers exports and that can be imported."""
    classes = {name: getattr(diffusers, name, None) for name in dir(diffusers)}
    return {
        name: one
        for name, one in sorted(classes.items())
        if inspect.isclass(one)
        and issubclass(one, diffusers.DiffusionPipeline)
        and one is not diffusers.DiffusionPipeline
    }


def built() -> set[str]:
    """Classes whose tiny pipeline is compared with the served picture."""
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
    """All lists of class names in the product."""
    return [
        whole_classes.WITHOUT_PICTURES,
        whole_classes.ALSO_NEEDED,
        whole_classes.NEGATIVE_NEEDED,
        whole_classes.MISCALLING,
        whole_classes.NO_SINGLE_FRAME,
        whole_classes.PRIORS,
    ]
