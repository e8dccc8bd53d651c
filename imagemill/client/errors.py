"""Errors of the client and the command, as a branch of the tree in `jobs.errors`.

    ImagemillError
    ├── ApiError            the server answered with an error
    ├── NoServer            no server was named and none is running here
    ├── ServerUnreachable   no answer, despite retries
    ├── CorruptDownload     the bytes that arrived don't match the image's checksum
    ├── CannotSave          a file can't be written
    ├── InvalidInput        invalid arguments or prompt file; one problem per line; exit code 2
    ├── AlreadyRunning      another `up` holds the data folder; exit code 3
    └── StartFailed         a server on this machine couldn't be started

Messages are written for the person at the terminal and shown without a traceback.
"""

from collections.abc import Sequence

from jobs.errors import FieldProblem, ImagemillError


class ApiError(ImagemillError):
    """The server answered with an error; mirrors its `application/problem+json` (RFC 9457)."""

    def __init__(
        self, status: int, title: str, detail: str = "", errors: Sequence[FieldProblem] = ()
    ) -> None:
        super().__init__(f"{detail or title} (HTTP {status})")
        self.status = status
        self.title = title
        self.detail = detail
        self.errors = tuple(errors)


class NoServer(ImagemillError):
    """No server was named, and none is running on the data folder."""


class ServerUnreachable(ImagemillError):
    """No answer from `url`."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"couldn't reach an imagemill server at {url}: {reason}")
        self.url = url


class CorruptDownload(ImagemillError):
    """An image's bytes don't match the checksum that the server committed."""


class CannotSave(ImagemillError):
    """A downloaded image or the contact sheet can't be written."""


class InvalidInput(ImagemillError):
    """The user's input is invalid; `problems` has one line per problem."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class AlreadyRunning(ImagemillError):
    """Another `imagemill up` holds the data folder."""


class StartFailed(ImagemillError):
    """A server on this machine couldn't be started; the message says why or where to look."""
