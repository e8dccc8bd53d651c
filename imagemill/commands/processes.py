"""The commands `worker` and `serve`, which run one part by itself, and `doctor`.

`worker` and `serve` replace this process, so signals and exit codes are their own.
"""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from imagemill.commands import complete
from imagemill.commands.help import Command
from imagemill.commands.options import (
    DATA,
    HOST,
    PORT,
    AsJson,
    Data,
    Host,
    Models,
    Port,
    catalog_path,
)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (worker, serve, doctor):
        app.command(cls=Command)(command)


def worker(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Run only this model's workers. Default: all models.",
            autocompletion=complete.models,
        ),
    ] = None,
    data: Data = DATA,
    models: Models = None,
) -> None:
    """Run only this machine's workers, on the queue at IMAGEMILL_REDIS_URL."""
    _become("workers", *(["--model", model] if model else []), data=data, models=models)


def serve(host: Host = HOST, port: Port = PORT, data: Data = DATA, models: Models = None) -> None:
    """Run only the HTTP service, on the queue at IMAGEMILL_REDIS_URL."""
    _become("service", "--host", host, "--port", str(port), data=data, models=models)


def _become(package: str, *arguments: str, data: Path, models: Path | None) -> None:
    from imagemill.local.children import environment, module

    command = module(package, *arguments)
    path = catalog_path(models).absolute()
    os.execve(command[0], command, environment(data=data.absolute(), models=path))


def doctor(
    host: Host = HOST,
    port: Port = PORT,
    data: Data = DATA,
    models: Models = None,
    as_json: AsJson = False,
) -> None:
    """Check whether this machine can generate images. Exits with 1 if something essential fails."""
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from imagemill.commands.doctor import findings
    from imagemill.terminal.output import print_json

    results = list(findings(data, catalog_path(models), host, port))
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        styles = {"ok": "green", "warning": "yellow", "bad": "bold red"}
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for result in results:
            verdict = Text(result.verdict, style=styles[result.verdict])
            table.add_row(result.name, verdict, Text(result.detail))
        Console().print(table)
    raise typer.Exit(1 if any(result.verdict == "bad" for result in results) else 0)
