"""imagemill for people: the `imagemill` command, the Python client, the one-machine launcher.

`from imagemill import Client` is all that a program needs; the names load on first use, so that
importing the package costs nothing. Knows neither torch nor Redis.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagemill.client.clients import AsyncClient, Client
    from imagemill.client.errors import ApiError, CorruptDownload, NoServer, ServerUnreachable
    from imagemill.client.jobs import AsyncJob, Job
    from imagemill.client.models import Image, Model, Progress, Worker

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncJob",
    "Client",
    "CorruptDownload",
    "Image",
    "Job",
    "Model",
    "NoServer",
    "Progress",
    "ServerUnreachable",
    "Worker",
]

_ERRORS = ("ApiError", "CorruptDownload", "NoServer", "ServerUnreachable")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'imagemill' has no attribute {name!r}")
    from importlib import import_module

    module = "imagemill.client.errors" if name in _ERRORS else "imagemill.client.clients"
    return getattr(import_module(module), name)
