"""Placements: where a model's weights live, and when they are loaded.

A placement's module is imported when an entry asks for it: each brings libraries of its own.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from pipelines.loading.checkpoint import Checkpoint
from pipelines.placements.family_pipeline import FamilyPipeline


class Follower(Protocol):
    """A rank above 0 of a group: it does its part of every forward pass of rank 0."""

    def run(self) -> None:
        """Follow until the leader says stop. Raises GroupLost when it is lost instead."""


Placement = Callable[[Model, Checkpoint, str], FamilyPipeline]
Following = Callable[[Model, Checkpoint, str], Follower]

PLACEMENTS = {
    "replica": "replica:load_replica",
    "split": "split:load_split",
    "context_parallel": "context_parallel:load_context_parallel",
    "pipelined": "pipelined:load_pipelined",
}
"""A catalog entry's placement -> what loads it on its one process, or on rank 0 of its group."""

FOLLOWERS = {
    "context_parallel": "context_parallel:follow_context_parallel",
    "pipelined": "pipelined:follow_pipelined",
}
"""The same for the other ranks."""


def placement_of(model: Model) -> Placement:
    """The loader of the model's placement. Raises ConfigurationError for one that is not here."""
    if model.placement not in PLACEMENTS:
        raise ConfigurationError(
            f"model {model.name!r}: there is no placement {model.placement!r}; "
            f"there is {', '.join(PLACEMENTS)}"
        )
    placement: Placement = _named(PLACEMENTS[model.placement])
    return placement


def following_of(model: Model) -> Following:
    """What loads a follower of the model's placement. Raises ConfigurationError if it has none."""
    if model.placement not in FOLLOWERS:
        raise ConfigurationError(
            f"model {model.name!r}: placement {model.placement!r} takes one process, not a group"
        )
    following: Following = _named(FOLLOWERS[model.placement])
    return following


def _named(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(f"{__name__}.{module}"), name)
