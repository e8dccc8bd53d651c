"""Families of models: the mathematics of each kind, written against diffusers' own modules."""

from importlib import import_module
from typing import Any

from jobs.errors import ModelUnavailable
from pipelines.families.family import Family
from pipelines.families.whole_classes import refusal

FAMILIES = {
    "ChromaPipeline": "chroma:Chroma",
    "FluxPipeline": "flux:Flux",
    "Flux2Pipeline": "flux2:Flux2",
    "Flux2KleinPipeline": "flux2:Flux2Klein",
    "PixArtSigmaPipeline": "pixart_sigma:PixArtSigma",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "SanaPipeline": "sana:Sana",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3",
    "StableDiffusionPipeline": "sd15:StableDiffusion",
    "StableDiffusionXLPipeline": "sdxl:StableDiffusionXL",
    "ZImagePipeline": "z_image:ZImage",
}
"""`_class_name` in model_index.json -> family, as module:class, imported when needed."""

FALLBACK = "whole_call:WholeCall"


def is_stepped(class_name: str) -> bool:
    """Whether the class has a family, so that its samples share forward passes."""
    return class_name in FAMILIES


def check_class(class_name: str) -> None:
    """Refuse a pipeline class that can't make images from text, before loading any weights.

    Passes classes that diffusers doesn't have; loading reports those. Raises ModelUnavailable.
    """
    pipeline = getattr(import_module("diffusers"), class_name, None)
    if class_name in FAMILIES or not isinstance(pipeline, type):
        return
    if sentence := refusal(pipeline):
        raise ModelUnavailable(sentence)


def make_family(pipe: Any, max_sequence_length: int | None) -> Family:
    """Build the family around a loaded diffusers pipeline.

    Raises ModelUnavailable if the pipeline doesn't make images from text, and ConfigurationError if
    it doesn't support `max_sequence_length`.
    """
    module, name = FAMILIES.get(type(pipe).__name__, FALLBACK).split(":")
    family: Family = getattr(import_module(f"{__name__}.{module}"), name)(pipe, max_sequence_length)
    return family
