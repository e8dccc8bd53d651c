"""Load checkpoints for `pipelines.load`: find, check and place them.

The checkpoint's `_class_name` selects the family and the entry selects the placement; they don't
depend on each other. If the worker is a group of processes, each of them loads its part: rank 0
with `load_pipeline`, the others with `load_follower`. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
must be set in the environment, as torchrun does.
"""

from collections.abc import Callable
from typing import TypeVar

from jobs.catalog import Model
from jobs.defaults import with_own_defaults
from jobs.errors import ConfigurationError, ModelUnavailable
from jobs.options import check_options
from pipelines.attention import sets_process_flags
from pipelines.device import check_device
from pipelines.families import check_class, is_stepped, make_family
from pipelines.loading.checkpoint import Checkpoint, find_checkpoint
from pipelines.loading.components import naming
from pipelines.loading.defaults import own_defaults
from pipelines.loading.examination import INDEX
from pipelines.placements import follower_loader_of, placement_of
from pipelines.planner.skeleton import skeletons
from pipelines.seam import Card, Follower, Pipeline

T = TypeVar("T")


def load_pipeline(model: Model, device: str) -> Pipeline:
    """See `pipelines.load.load_pipeline`."""
    placement = placement_of(model)
    checkpoint = _find(model)
    model = _with_own_defaults(model, checkpoint)
    _named(model, lambda: _check(model, checkpoint, device))
    pipeline = _named(model, lambda: placement(model, checkpoint, device))
    if model.attention_backend is not None and sets_process_flags(model.attention_backend):
        pipeline.run_one_at_a_time()
    return pipeline


def resolve_defaults(model: Model) -> Model:
    """See `pipelines.load.resolve_defaults`."""
    return _with_own_defaults(model, _find(model))


def read_card(model: Model) -> tuple[Card, str | None]:
    """See `pipelines.load.read_card`."""
    checkpoint = _find(model)
    pipe = checkpoint.load(model, **skeletons(model, checkpoint))
    family = make_family(pipe, model.max_sequence_length)
    return family.card, family.tokenizer_json()


def load_follower(model: Model, device: str) -> Follower:
    """See `pipelines.load.load_follower`."""
    load = follower_loader_of(model)
    checkpoint = _find(model)
    model = _with_own_defaults(model, checkpoint)
    _named(model, lambda: _check(model, checkpoint, device))
    return _named(model, lambda: load(model, checkpoint, device))


def _check(model: Model, checkpoint: Checkpoint, device: str) -> None:
    name = checkpoint.class_name
    check_options(model.placement, model.options, name, is_stepped(name))
    check_device(model, checkpoint, device)


def _check_class(checkpoint: Checkpoint) -> None:
    try:
        check_class(checkpoint.class_name)
    except ModelUnavailable as error:
        raise ModelUnavailable(
            f"{error} ({checkpoint.folder / INDEX}); set path to a text-to-image model"
        ) from error


def _find(model: Model) -> Checkpoint:
    """Find the checkpoint; its class must be supported. Raises ModelUnavailable."""
    checkpoint = find_checkpoint(model)
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
