"""Every error that imagemill raises on purpose, as one tree.

    ImagemillError
    ├── InvalidRequest         bad input from the caller, one problem per field
    │   └── UnknownModel       the catalog has no such model
    ├── NotFound               no such job or image
    ├── Conflict               the job's or image's state doesn't allow this
    ├── IdempotencyMismatch    the same Idempotency-Key with a different body
    ├── QuotaExceeded          the caller has too many unfinished images
    ├── ConfigurationError     bad settings or catalog; the process doesn't start
    ├── NoRecipe               a file isn't an image or contains no valid recipe
    ├── StorageUnavailable     the queue or image storage is temporarily down or full
    └── PipelineError          a problem with the model or one of its images
        ├── ModelUnavailable   the model can't be loaded; names the file and the entry
        ├── ImageFailed        this image can't be made, and a retry wouldn't help
        ├── OutOfMemory        a forward batch didn't fit the device
        └── GroupLost          a rank of the group died or diverged; the whole group must end

This module is independent of HTTP; `service/http/errors.py` has a table of each class's status.
"""

from dataclasses import dataclass


class ImagemillError(Exception):
    """Root of the tree. The message is one sentence for the person who can fix the problem."""


@dataclass(frozen=True)
class FieldProblem:
    """What is wrong with one field: an RFC 6901 pointer into the body, and a sentence."""

    pointer: str
    detail: str


class InvalidRequest(ImagemillError):
    """The caller's input is invalid; `problems` has an entry for every bad field."""

    def __init__(self, message: str, problems: tuple[FieldProblem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class UnknownModel(InvalidRequest):
    """The catalog has no model with that name; `known` lists the ones it has."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        message = f"unknown model {name!r}; known models: {', '.join(known) or 'none'}"
        super().__init__(message, (FieldProblem("/model", message),))
        self.name = name
        self.known = known


class NotFound(ImagemillError):
    """The job or image doesn't exist, or belongs to another caller."""


class Conflict(ImagemillError):
    """The current state doesn't allow this, such as downloading an image before it's made."""


class IdempotencyMismatch(ImagemillError):
    """An Idempotency-Key was reused with a different body."""


class QuotaExceeded(ImagemillError):
    """The caller would have more unfinished images than allowed."""


class ConfigurationError(ImagemillError):
    """The settings or the catalog are wrong; the process reports it and doesn't start."""


class NoRecipe(ImagemillError):
    """A file isn't an image or contains no valid recipe."""


class StorageUnavailable(ImagemillError):
    """The queue or the image storage is temporarily unavailable; try again later."""


class PipelineError(ImagemillError):
    """A model can't be loaded, or one of its images can't be made."""


class ModelUnavailable(PipelineError):
    """A model can't be loaded; the message names the catalog entry and the file.

    `may_pass` means the problem may go away by itself, such as an unreachable hub.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class ImageFailed(PipelineError):
    """An image can't be made, and a retry wouldn't help."""


class OutOfMemory(PipelineError):
    """A forward batch didn't fit the device; a smaller one may."""


class GroupLost(PipelineError):
    """A rank of the worker's group died, hung or diverged; no image is to blame."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
