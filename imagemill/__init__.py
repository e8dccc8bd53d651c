"""imagemill for people: the `imagemill` command, the Python client, the one-machine launcher.

`from imagemill import Client` is all that a program needs; the names load on first use, so that
importing the package costs nothing. Knows neither torch nor Redis.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagemill.client import AsyncClient, AsyncJob, Client, Image, Job
    from imagemill.errors import ApiError, CorruptDownload, NoServer, ServerUnreachable

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncJob",
    "Client",
    "CorruptDownload",
    "Image",
    "Job",
    "NoServer",
    "ServerUnreachable",
]

_ERRORS = ("ApiError", "CorruptDownload", "NoServer", "ServerUnreachable")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'imagemill' has no attribute {name!r}")
    from importlib import import_module

    module = "imagemill.errors" if name in _ERRORS else "imagemill.client"
    return getattr(import_module(module), name)
