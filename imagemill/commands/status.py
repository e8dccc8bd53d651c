"""Commands that look at a server: status, models, workers.

They start nothing: without a server there is nothing to look at, and one sentence says so.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from imagemill.commands import complete
from imagemill.commands.options import DATA, AsJson, Data, Server

ROWS_SHOWN = 50


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (status, models, workers):
        app.command()(command)


def status(
    job: Annotated[
        str | None,
        typer.Argument(help="A job; default: the latest ones.", autocompletion=complete.jobs),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many jobs.")] = 20,
    server: Server = None,
    data: Data = DATA,
    as_json: AsJson = False,
) -> None:
    """Show the latest jobs, or one of them with its images."""
    from imagemill.client import protocol
    from imagemill.terminal import show

    console = Console()
    if job is None:
        jobs = _get(server, data, "/v1/jobs", limit=limit)["data"]
        if as_json:
            _print_json(jobs)
        elif jobs:
            console.print(show.jobs_table(jobs))
        else:
            console.print("no jobs yet")
        return
    found = _get(server, data, protocol.job_path(job))
    if as_json:
        _print_json(found)
        return
    console.print(show.job_facts(found))
    rows = [{**image, "file": _doing(image)} for image in found["images"][:ROWS_SHOWN]]
    console.print()
    console.print(show.results_table(rows, last="doing"))
    if len(found["images"]) > ROWS_SHOWN:
        console.print(f"… and {len(found['images']) - ROWS_SHOWN} more")


def _doing(image: dict[str, Any]) -> str:
    if image["state"] == "succeeded":
        return f"made in {image['seconds']:.1f} s" if image["seconds"] is not None else "made"
    if image["state"] == "queued" or not image["step"]:
        return ""
    stopped = "stopped at " if image["state"] == "cancelled" else ""
    return f"{stopped}step {image['step']} of {image['steps']}"


def models(server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """Show the models that a server offers."""
    from imagemill.terminal import show

    found = _get(server, data, "/v1/models")["data"]
    if as_json:
        _print_json(found)
    else:
        Console().print(show.models_table(found))


def workers(server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """Show who makes the images: model, device, speed."""
    from imagemill.terminal import show

    found = _get(server, data, "/v1/workers")["data"]
    if as_json:
        _print_json(found)
    elif found:
        Console().print(show.workers_table(found))
    else:
        Console().print("no workers are running")


def _get(server: str | None, data: Path, path: str, **params: Any) -> dict[str, Any]:
    from imagemill.client.clients import Client
    from imagemill.local.find_server import given_server

    with Client(given_server(server, data), patience=5) as client:
        return client.get(path, **params)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
