"""A catalog entry to a running Pipeline: the one door to this package for the workers.

The checkpoint's `_class_name` chooses the family, the entry chooses the placement; neither knows
the other. A placement whose worker is a group of processes is loaded by all of them: rank 0 by
`load_pipeline`, the others by `load_follower`, each in an environment with RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT as torchrun sets them.
"""

from collections.abc import Callable
from typing import TypeVar

from jobs.catalog import Model
from jobs.defaults import with_own_defaults
from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.attention import sets_process_flags
from pipelines.checkpoint import Checkpoint, find_checkpoint
from pipelines.components import naming
from pipelines.defaults import own_defaults
from pipelines.device import check_device
from pipelines.examination import INDEX
from pipelines.fake import FakePipeline
from pipelines.families import check_class, make_family
from pipelines.placements import Follower, following_of, placement_of
from pipelines.seam import Card, Pipeline
from pipelines.skeleton import skeletons

T = TypeVar("T")


def load_pipeline(model: Model, device: str) -> Pipeline:
    """Load the model's checkpoint and place it on `device` ("cpu", "cuda:0").

    A folder whose model_index.json says `"_class_name": "FakePipeline"` makes the fake, so that
    tests can run real worker processes without a model. Raises ModelUnavailable when the
    checkpoint is missing or damaged, ConfigurationError when the entry asks for what the model or
    this package has not, OutOfMemory when the device is too small, GroupLost when another rank of
    the group ends.
    """
    placement = placement_of(model)
    checkpoint = _find(model)
    model = _with_own_defaults(model, checkpoint)
    if checkpoint.class_name == FakePipeline.__name__:
        return FakePipeline(**checkpoint.index.get("options", {}))
    _named(model, lambda: check_device(model, checkpoint, device))
    pipeline = _named(model, lambda: placement(model, checkpoint, device))
    if model.attention_backend is not None and sets_process_flags(model.attention_backend):
        pipeline.run_one_at_a_time()
    return pipeline


def resolve_defaults(model: Model) -> Model:
    """The model with the defaults that its entry leaves open, from its folder without its weights.

    Raises ModelUnavailable.
    """
    return _with_own_defaults(model, _find(model)) if model.unset else model


def read_card(model: Model) -> tuple[Card, str | None]:
    """What the model will turn out to be, and its tokenizer: from its configs, without its weights.

    Takes a second where loading takes minutes. Raises ModelUnavailable, and what the libraries
    raise over a pipeline that cannot be made without weights.
    """
    checkpoint = _find(model)
    if checkpoint.class_name == FakePipeline.__name__:
        fake = FakePipeline(**checkpoint.index.get("options", {}))
        return fake.card, fake.tokenizer_json()
    pipe = checkpoint.load(model, **skeletons(model, checkpoint))
    family = make_family(pipe, model.max_sequence_length)
    return family.card, family.tokenizer_json()


def load_follower(model: Model, device: str) -> Follower:
    """Load this rank's part of the model, for a RANK above 0 of the model's group.

    Raises as `load_pipeline` does.
    """
    following = following_of(model)
    checkpoint = _find(model)
    model = _with_own_defaults(model, checkpoint)
    _named(model, lambda: check_device(model, checkpoint, device))
    return _named(model, lambda: following(model, checkpoint, device))


def dismiss(pipeline: Pipeline) -> None:
    """End the followers of the pipeline's group, before its process ends; others have none."""
    end = getattr(pipeline, "dismiss", None)
    if end is not None:
        end()


def _check_class(checkpoint: Checkpoint) -> None:
    try:
        check_class(checkpoint.class_name)
    except ModelUnavailable as error:
        raise ModelUnavailable(
            f"{error} ({checkpoint.folder / INDEX}); set path to a text-to-image model"
        ) from error


def _find(model: Model) -> Checkpoint:
    """The checkpoint, of a class that can be served. Raises ModelUnavailable."""
    checkpoint = find_checkpoint(model)
    if checkpoint.class_name != FakePipeline.__name__:
        checkpoint.pipeline_class(model)
        with naming(model.name):
            _check_class(checkpoint)
    return checkpoint


def _with_own_defaults(model: Model, checkpoint: Checkpoint) -> Model:
    return with_own_defaults(model, own_defaults(model, checkpoint)) if model.unset else model


def _named(model: Model, load: Callable[[], T]) -> T:
    try:
        return load()
    except ConfigurationError as error:
        raise ConfigurationError(f"model {model.name!r}: {error}") from error
