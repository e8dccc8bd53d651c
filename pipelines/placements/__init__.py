"""Placements: where a model's weights live, and when they are loaded."""

from collections.abc import Callable

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from pipelines.checkpoint import Checkpoint
from pipelines.placements.replica import load_replica
from pipelines.seam import Pipeline

Placement = Callable[[Model, Checkpoint, str], Pipeline]

PLACEMENTS: dict[str, Placement] = {"replica": load_replica}


def placement_of(model: Model) -> Placement:
    """The loader of the model's placement. Raises ConfigurationError for one that is not here."""
    if model.placement not in PLACEMENTS:
        raise ConfigurationError(
            f"model {model.name!r}: there is no placement {model.placement!r}; "
            f"there is {', '.join(PLACEMENTS)}"
        )
    return PLACEMENTS[model.placement]
