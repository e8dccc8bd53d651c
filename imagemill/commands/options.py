"""The flags that several commands share, each with its variable and its default.

Imports nothing heavy: every command's `--help` passes through here.
"""

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    Path, typer.Option(envvar="IMAGEMILL_DATA", help="Folder for the queue and the images.")
]
Models = Annotated[
    Path | None,
    typer.Option(envvar="IMAGEMILL_MODELS", help="The catalog; default: ./models.toml."),
]
Server = Annotated[
    str | None,
    typer.Option(
        envvar="IMAGEMILL_SERVER",
        help="Address of a server; default: the one that runs on the data folder.",
    ),
]
Host = Annotated[str, typer.Option(envvar="IMAGEMILL_HOST", help="Address to listen on.")]
Port = Annotated[
    int, typer.Option(envvar="IMAGEMILL_PORT", min=0, max=65535, help="0 picks a free one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, messages on stderr.")]

DATA = Path("data")
HOST, PORT = "127.0.0.1", 8000


def catalog_path(given: Path | None) -> Path:
    """The catalog that was named, or ./models.toml, or the one beside our packages."""
    here = Path("models.toml")
    ours = Path(__file__).resolve().parents[2] / "models.toml"
    return given or (ours if ours.exists() and not here.exists() else here)
