"""What can go wrong on this side of HTTP, as a branch of `jobs.errors`' tree.

    ImagemillError
    ├── ApiError            the server answered, and said no
    ├── NoServer            none was named, and none runs here
    ├── ServerUnreachable   no answer, for as long as the client was willing to try
    ├── CorruptDownload     bytes arrived that are not the image's
    ├── CannotSave          a file cannot be written here
    ├── NoRecipe            a file is no image, or none that says how it was made
    ├── InvalidInput        what the user typed, or a prompt file; one problem a line; exit code 2
    ├── AlreadyRunning      another `up` holds the data folder; exit code 3
    └── StartFailed         a server on this machine could not be started

Each message is for the person at the terminal; none is ever shown with a traceback.
"""

from collections.abc import Sequence

from jobs.errors import FieldProblem, ImagemillError


class ApiError(ImagemillError):
    """The server refused; mirrors its `application/problem+json` (RFC 9457)."""

    def __init__(
        self, status: int, title: str, detail: str = "", errors: Sequence[FieldProblem] = ()
    ) -> None:
        super().__init__(f"{detail or title} (HTTP {status})")
        self.status = status
        self.title = title
        self.detail = detail
        self.errors = tuple(errors)


class NoServer(ImagemillError):
    """No server was named, and none runs on the data folder."""


class ServerUnreachable(ImagemillError):
    """Nobody answered at `url`."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"no imagemill server answers at {url}: {reason}")
        self.url = url


class CorruptDownload(ImagemillError):
    """An image's bytes do not have the checksum that the server committed."""


class CannotSave(ImagemillError):
    """A downloaded image, or the sheet, cannot be written."""


class NoRecipe(ImagemillError):
    """A file is no image, or one that does not say how it was made."""


class InvalidInput(ImagemillError):
    """What the user asked for cannot be done as asked; `problems` has a line for each reason."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class AlreadyRunning(ImagemillError):
    """Another `imagemill up` holds the data folder."""


class StartFailed(ImagemillError):
    """A server on this machine could not be started; the message says why and where to look."""
