"""The `imagemill` command, the Python client and the one-machine launcher.

`from imagemill import Client` is all a program needs. The names load on first use, so importing
the package is cheap. Imports neither torch nor Redis.
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
