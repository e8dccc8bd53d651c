"""Load a catalog entry as a running Pipeline: the workers' entry point to this package.

`pipelines.loaders` does the work. It's imported at the first use, because its imports (diffusers,
transformers, scipy) take seconds, and the fake needs none of them. A folder with
`"_class_name": "FakePipeline"` in its model_index.json loads the fake, so that tests can run real
worker processes without a model.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.catalog import Defaults, Model
from jobs.defaults import with_own_defaults
from pipelines.fake import fake_of
from pipelines.seam import Card, Follower, Pipeline


def load_pipeline(model: Model, device: str) -> Pipeline:
    """Load the model's checkpoint and place it on `device` ("cpu", "cuda:0").

    Raises ModelUnavailable if the checkpoint is missing or damaged, ConfigurationError if the entry
    sets something that the model or this package doesn't support, OutOfMemory if the device is too
    small, and GroupLost if another rank of the group ends.
    """
    if fake := fake_of(model):
        return fake
    with _no_collections():
        from pipelines import loaders
    return loaders.load_pipeline(model, device)


def resolve_defaults(model: Model) -> Model:
    """Fill in the defaults that the model's entry doesn't set, from its folder's configs.

    Raises ModelUnavailable.
    """
    if not model.unset:
        return model
    if fake_of(model):
        return with_own_defaults(model, Defaults())
    with _no_collections():
        from pipelines import loaders
    return loaders.resolve_defaults(model)


def read_card(model: Model) -> tuple[Card, str | None]:
    """The model's card and its tokenizer, from its configs without its weights.

    This takes a second, while loading takes minutes. Raises ModelUnavailable, and the libraries'
    own errors for a pipeline that can't be created without weights.
    """
    if fake := fake_of(model):
        return fake.card, fake.tokenizer_json()
    with _no_collections():
        from pipelines import loaders
    return loaders.read_card(model)


def load_follower(model: Model, device: str) -> Follower:
    """Load this rank's part of the model, for a RANK above 0 in the model's group.

    Raises the same errors as `load_pipeline`.
    """
    with _no_collections():
        from pipelines import loaders
    return loaders.load_follower(model, device)


def dismiss(pipeline: Pipeline) -> None:
    """End the followers of the pipeline's group, if it has one, before its process ends."""
    end = getattr(pipeline, "dismiss", None)
    if end is not None:
        end()


@contextmanager
def _no_collections() -> Iterator[None]:
    """Pause garbage collection, which takes a sixth of the time of a large import."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
