"""A catalog entry to a running Pipeline: the one door to this package for the workers.

The checkpoint's `_class_name` chooses the family, the entry chooses the placement; neither knows
the other.
"""

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from pipelines.checkpoint import find_checkpoint
from pipelines.fake import FakePipeline
from pipelines.placements import placement_of
from pipelines.seam import Pipeline


def load_pipeline(model: Model, device: str) -> Pipeline:
    """Load the model's checkpoint and place it on `device` ("cpu", "cuda:0").

    A folder whose model_index.json says `"_class_name": "FakePipeline"` makes the fake, so that
    tests can run real worker processes without a model. Raises ModelUnavailable when the
    checkpoint is missing or damaged, ConfigurationError when the entry asks for what the model or
    this package has not, OutOfMemory when the device is too small.
    """
    placement = placement_of(model)
    checkpoint = find_checkpoint(model)
    if checkpoint.class_name == FakePipeline.__name__:
        return FakePipeline(**checkpoint.index.get("options", {}))
    try:
        return placement(model, checkpoint, device)
    except ConfigurationError as error:
        raise ConfigurationError(f"model {model.name!r}: {error}") from error
