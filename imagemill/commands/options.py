"""Flags shared by several commands, with their environment variables and defaults.

Imports nothing heavy, because every command's `--help` runs through here.
"""

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    Path, typer.Option(envvar="IMAGEMILL_DATA", help="Folder of the queue and the images.")
]
Models = Annotated[
    Path | None,
    typer.Option(
        envvar="IMAGEMILL_MODELS", help="The catalog. Default: ./models.toml, or the built-in one."
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        envvar="IMAGEMILL_SERVER",
        help="The server's address. Default: the server running on the data folder.",
    ),
]
Host = Annotated[str, typer.Option(envvar="IMAGEMILL_HOST", help="Address to listen on.")]
Port = Annotated[
    int, typer.Option(envvar="IMAGEMILL_PORT", min=0, max=65535, help="Port; 0 picks a free one.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON to stdout and messages to stderr.")
]

DATA = Path("data")
HOST, PORT = "127.0.0.1", 8000


def catalog_path(path: Path | None) -> Path:
    """The given catalog, or ./models.toml, or the built-in one."""
    from jobs.catalog import BUILT_IN

    here = Path("models.toml")
    return path or (here if here.exists() else BUILT_IN)
