"""Commands that show a server's state: status, models, workers.

They never start a server; without one they fail with a sentence.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from imagemill.commands import complete
from imagemill.commands.options import DATA, AsJson, Data, Server
from imagemill.terminal.output import print_json

ROWS_SHOWN = 50


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (status, models, workers):
        app.command()(command)


def status(
    job: Annotated[
        str | None,
        typer.Argument(help="A job id. Default: the latest jobs.", autocompletion=complete.jobs),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Number of jobs to list.")] = 20,
    server: Server = None,
    data: Data = DATA,
    as_json: AsJson = False,
) -> None:
    """Show the latest jobs, or one job with its images."""
    from imagemill.client import protocol
    from imagemill.terminal import show

    console = Console()
    if job is None:
        jobs = _get(server, data, "/v1/jobs", limit=limit)["data"]
        if as_json:
            print_json(jobs)
        elif jobs:
            console.print(show.jobs_table(jobs))
        else:
            console.print("no jobs yet")
        return
    document = _get(server, data, protocol.job_path(job))
    if as_json:
        print_json(document)
        return
    console.print(show.job_facts(document))
    rows = [{**image, "file": _detail(image)} for image in document["images"][:ROWS_SHOWN]]
    console.print()
    console.print(show.results_table(rows, last="details"))
    if len(document["images"]) > ROWS_SHOWN:
        console.print(f"… and {len(document['images']) - ROWS_SHOWN} more")


def _detail(image: dict[str, Any]) -> str:
    if image["state"] == "succeeded":
        took = [f"took {image['seconds']:.1f} s"] if image["seconds"] is not None else []
        return ", ".join([*took, *image.get("warnings", ())])
    if image["state"] == "queued" or not image["step"]:
        return ""
    stopped = "stopped at " if image["state"] == "cancelled" else ""
    return f"{stopped}step {image['step']} of {image['steps']}"


def models(server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """List the models of a server."""
    from imagemill.client.models import Model
    from imagemill.terminal import show

    entries = _get(server, data, "/v1/models")["data"]
    if as_json:
        print_json(entries)
    else:
        Console().print(show.models_table([Model.parse(raw) for raw in entries]))


def workers(server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """List the workers of a server with their model, device and speed."""
    from imagemill.client.models import Worker
    from imagemill.terminal import show

    entries = _get(server, data, "/v1/workers")["data"]
    if as_json:
        print_json(entries)
    elif entries:
        Console().print(show.workers_table([Worker.parse(raw) for raw in entries]))
    else:
        Console().print("no workers are running")


def _get(server: str | None, data: Path, path: str, **params: Any) -> dict[str, Any]:
    from imagemill.client.clients import Client
    from imagemill.local.find_server import resolve_server

    with Client(resolve_server(server, data), patience=5) as client:
        return client.get(path, **params)
