"""Commands that run one part by itself, `worker` and `serve`, and `doctor`.

The parts replace this process, so that signals and exit codes are theirs.
"""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from imagemill.commands import complete
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
        app.command()(command)


def worker(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Only this model's workers; default: all models'.",
            autocompletion=complete.models,
        ),
    ] = None,
    data: Data = DATA,
    models: Models = None,
) -> None:
    """Run this machine's workers alone; IMAGEMILL_REDIS_URL names the queue they share."""
    _become("workers", *(["--model", model] if model else []), data=data, models=models)


def serve(host: Host = HOST, port: Port = PORT, data: Data = DATA, models: Models = None) -> None:
    """Run the HTTP service alone; IMAGEMILL_REDIS_URL names the queue."""
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
    """Check whether this machine can make images; exit code 1 if something essential is amiss."""
    import json
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from imagemill.commands.doctor import findings

    found = list(findings(data, catalog_path(models), host, port))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        styles = {"ok": "green", "warning": "yellow", "bad": "bold red"}
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for one in found:
            table.add_row(one.name, Text(one.verdict, style=styles[one.verdict]), Text(one.detail))
        Console().print(table)
    raise typer.Exit(1 if any(finding.verdict == "bad" for finding in found) else 0)
