"""What context parallelism refuses: options and degrees at start, sizes when an image starts.

Computes nothing and starts no group, so `imagemill plan` uses these checks too.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from jobs.catalog import Model
from jobs.errors import ConfigurationError, ImageFailed
from jobs.request import ImageRequest
from pipelines.attention import check_backend, check_parallel
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.quantization import check_plain
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.group import check_devices, check_world
from pipelines.placements.tensor_parallel import check_tensor
from pipelines.placements.transformer_classes import ParallelPlan, parallel_plan_of


def check_entry(model: Model, checkpoint: Checkpoint, device: str) -> ParallelPlan:
    """Check all that can be checked before loading or joining; returns the transformer's plan.

    Every rank comes to the same verdict before it joins, so none waits for ranks that refused.
    Raises ConfigurationError.
    """
    check_world(model)
    check_devices(torch.device(device))
    name = checkpoint.components.get("transformer", checkpoint.class_name)
    plan = parallel_plan_of(name)
    check_plain(checkpoint, model.placement)
    if model.attention_backend is not None:
        check_backend(model.attention_backend)
        split = model.ring * model.ulysses > 1
        check_parallel(model.attention_backend, model.ring, split, torch.device(device))
    transformer: Any = getattr(import_module("diffusers"), name)
    config: Mapping[str, Any] = transformer.load_config(checkpoint.source("transformer").config)
    if model.tensor > 1:
        check_tensor(model.tensor, transformer, config, config[plan.heads])
    elif model.ring * model.ulysses > 1:
        check_sequence(model, name, plan, config[plan.heads])
    return plan


def check_sequence(model: Model, name: str, plan: ParallelPlan, heads: int) -> None:
    """Raise ConfigurationError if the degrees don't fit the number of heads or the plan.

    `name` is the transformer's class.
    """
    if plan.unsplit:
        raise ConfigurationError(
            f"ring and ulysses can't split {name}: {plan.unsplit}; cfg and tensor can"
        )
    degree, ulysses = model.ring * model.ulysses, model.ulysses
    unified = model.ring > 1 and ulysses > 1
    if heads % ulysses:
        missing = -heads % ulysses
        # diffusers pads the heads to a multiple of `ulysses`; a whole rank of padding fails.
        if unified:
            raise ConfigurationError(f"unified: ulysses {ulysses} doesn't divide the {heads} heads")
        if missing >= (heads + missing) // ulysses:
            raise ConfigurationError(
                f"ulysses {ulysses} leaves a rank without any of the {heads} heads"
            )
    if unified and plan.text is None and plan.grain % degree:
        raise ConfigurationError(
            f"unified: ring {model.ring} x ulysses {ulysses} doesn't divide {plan.grain}, the "
            "multiple to which the transformer pads its tokens"
        )
    length = model.max_sequence_length or 512
    if plan.text is not None and plan.mask is None:
        if unified and length % degree:
            raise ConfigurationError(
                f"unified: ring {model.ring} x ulysses {ulysses} doesn't divide the "
                f"{length} tokens of a prompt; change max_sequence_length"
            )
        if length < degree:
            raise ConfigurationError(
                f"max_sequence_length {length} is less than the {degree} ranks"
            )


class SizeCheck:
    """Refuses images whose tokens the group can't split correctly."""

    def __init__(self, model: Model, plan: ParallelPlan, pipeline: FamilyPipeline) -> None:
        self.pipeline, self.plan = pipeline, plan
        self.degree = model.ring * model.ulysses
        self.unified = model.ring > 1 and model.ulysses > 1
        self.name = f"ring {model.ring} x ulysses {model.ulysses}"

    def __call__(self, request: ImageRequest) -> None:
        """Raise ImageFailed for such an image."""
        if self.plan.image is None:  # the transformer pads its tokens itself
            return
        tokens = self.pipeline.tokens(request)
        size = f"{request.width}x{request.height} is {tokens} tokens"
        if self.unified and tokens % self.degree:
            raise ImageFailed(f"{size}, which {self.name} (unified attention) can't split evenly")
        if tokens < self.degree:
            raise ImageFailed(f"{size}, fewer than the {self.degree} ranks of {self.name}")
