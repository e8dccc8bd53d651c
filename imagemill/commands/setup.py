"""`imagemill init`: writes a commented catalog to start from."""

from pathlib import Path
from typing import Annotated

import typer

from imagemill.commands.help import Command


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(cls=Command)(init)


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("models.toml"),
) -> None:
    """Write a commented models.toml with the bundled model. Never overwrites a file."""
    from imagemill.client.errors import InvalidInput
    from jobs.catalog import BUILT_IN

    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(BUILT_IN.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise InvalidInput(f"{file} exists already; it's left as it is") from error
    typer.echo(f"wrote {file}; add your models to it, then run `imagemill up`")
