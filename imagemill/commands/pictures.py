"""Commands for finished images: `inspect` reads a recipe, `replay` runs it again."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from imagemill.commands.help import Command
from imagemill.commands.options import DATA, AsJson, Data, Models, Server
from imagemill.terminal.output import print_json


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (inspect, replay):
        app.command(cls=Command)(command)


def inspect(
    files: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WebP files.")],
    as_json: AsJson = False,
) -> None:
    """Show the recipe stored in an image: prompt, seed, model, versions.

    The exit code is 1 if a file has no recipe or isn't an image.
    """
    from imagemill.terminal import show
    from jobs.errors import NoRecipe
    from jobs.recipe import read_recipe

    console, stderr = Console(), Console(stderr=True, soft_wrap=True, highlight=False)
    documents: list[dict[str, Any]] = []
    failed = False
    for path in files:
        try:
            facts = read_recipe(path).facts()
        except NoRecipe as error:
            stderr.print(f"[red]error:[/red] {escape(str(error))}")
            failed = True
            continue
        if documents and not as_json:
            console.print()
        documents.append({"file": str(path), **facts})
        if not as_json:
            console.print(show.recipe_table(path, facts))
    if as_json:
        print_json(documents)
    raise typer.Exit(1 if failed else 0)


def replay(
    file: Annotated[Path, typer.Argument(help="An image with a recipe.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Save the new image as this file.")
    ] = None,
    server: Server = None,
    data: Data = DATA,
    models: Models = None,
    as_json: AsJson = False,
) -> None:
    """Generate an image again from its recipe and compare the pixels.

    The exit code is 0 if they're bit-equal, else 1. Starts a private server if none is running.
    """
    from imagemill.commands.replay import Replay

    console, stderr = Console(), Console(stderr=True)
    verdict = Replay(file, out, server, data, models, stderr if as_json else console).run()
    if verdict is None:
        raise typer.Exit(130)
    if as_json:
        print_json(verdict.document())
    else:
        for sentence in verdict.sentences():
            console.print(escape(sentence), highlight=False, soft_wrap=True)
    raise typer.Exit(0 if verdict.is_equal else 1)
