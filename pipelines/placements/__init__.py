"""Placements: where a model's weights live and when they're loaded.

A placement's module is imported only when a catalog entry asks for it, because each one brings its
own libraries.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from pipelines.loading.checkpoint import Checkpoint
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.seam import Follower

Placement = Callable[[Model, Checkpoint, str], FamilyPipeline]
FollowerLoader = Callable[[Model, Checkpoint, str], Follower]

PLACEMENTS = {
    "replica": "replica:load_replica",
    "split": "split:load_split",
    "context_parallel": "context_parallel:load_context_parallel",
    "pipelined": "pipelined:load_pipelined",
}
"""Placement -> loader for its single process, or for rank 0 of its group."""

FOLLOWERS = {
    "context_parallel": "context_parallel:follow_context_parallel",
    "pipelined": "pipelined:follow_pipelined",
}
"""Placement -> loader for the other ranks of its group."""


def placement_of(model: Model) -> Placement:
    """The loader of the model's placement. Raises ConfigurationError if it's unknown."""
    if model.placement not in PLACEMENTS:
        raise ConfigurationError(
            f"model {model.name!r}: unknown placement {model.placement!r}; "
            f"expected one of {', '.join(PLACEMENTS)}"
        )
    loader: Placement = _import(PLACEMENTS[model.placement])
    return loader


def follower_loader_of(model: Model) -> FollowerLoader:
    """The follower's loader. Raises ConfigurationError for a placement without groups."""
    if model.placement not in FOLLOWERS:
        raise ConfigurationError(
            f"model {model.name!r}: placement {model.placement!r} runs as one process, not a group"
        )
    loader: FollowerLoader = _import(FOLLOWERS[model.placement])
    return loader


def _import(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(f"{__name__}.{module}"), name)
