"""Every error that imagemill raises on purpose, in one tree.

    ImagemillError
    ├── InvalidRequest         the caller's input, one problem per field
    │   └── UnknownModel       the catalog has no such model
    ├── NotFound               no such job or image
    ├── Conflict               the move does not fit the state it meets
    ├── IdempotencyMismatch    the same Idempotency-Key came with another body
    ├── QuotaExceeded          the caller has too many unfinished images
    ├── ConfigurationError     settings or catalog that cannot work; the process does not start
    ├── StorageUnavailable     the queue or the image store refuses writes for now (full, starting)
    └── PipelineError          the model or one image of it
        ├── ModelUnavailable   the model cannot be loaded: which file, which entry
        ├── ImageFailed        this image cannot be made; trying again would not help
        ├── OutOfMemory        the forward batch did not fit the device
        └── GroupLost          a rank of the group is gone or out of step; the whole group must end

The module knows nothing of HTTP; `service/http/errors.py` maps each class to a status in one table.
"""

from dataclasses import dataclass


class ImagemillError(Exception):
    """Root of the tree; the message is one sentence for the person who can mend it."""


@dataclass(frozen=True)
class FieldProblem:
    """What is wrong with one field: an RFC 6901 pointer into the body, and a sentence."""

    pointer: str
    detail: str


class InvalidRequest(ImagemillError):
    """The caller's input cannot be made into images; carries a problem for every bad field."""

    def __init__(self, message: str, problems: tuple[FieldProblem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class UnknownModel(InvalidRequest):
    """The catalog has no model of that name; `known` lists those it has."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        message = f"unknown model {name!r}; known models: {', '.join(known) or 'none'}"
        super().__init__(message, (FieldProblem("/model", message),))
        self.name = name
        self.known = known


class NotFound(ImagemillError):
    """No such job or image, or it belongs to somebody else."""


class Conflict(ImagemillError):
    """The move does not fit the state it meets, such as an image asked for before it is made."""


class IdempotencyMismatch(ImagemillError):
    """An Idempotency-Key came again with another body."""


class QuotaExceeded(ImagemillError):
    """The caller already has as many unfinished images as it may have."""


class ConfigurationError(ImagemillError):
    """Settings or a catalog that cannot work; the process says so and does not start."""


class StorageUnavailable(ImagemillError):
    """The queue or the image store refuses writes for the moment; trying again later helps."""


class PipelineError(ImagemillError):
    """A model, or one image of it, cannot be made."""


class ModelUnavailable(PipelineError):
    """A model cannot be loaded; the message names the catalog entry and the file.

    `may_pass` tells a trouble that may pass by itself, such as a hub that can't be reached.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class ImageFailed(PipelineError):
    """One image cannot be made, and trying again would not help."""


class OutOfMemory(PipelineError):
    """A forward batch did not fit the device; a smaller one may."""


class GroupLost(PipelineError):
    """A rank of the worker's group died, hung or disagreed; no image is to blame."""
