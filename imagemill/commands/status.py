"""Commands that show a server's state: status, models, workers.

They never start a server; without one they fail with a sentence.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType

from imagemill.commands import complete
from imagemill.commands.help import Command
from imagemill.commands.options import DATA, AsJson, Data, Server
from imagemill.terminal.output import print_json

ROWS_SHOWN = 50

WATCH_PAUSE = 1.0
"""Seconds between two looks of `status --watch`."""


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (status, models, workers):
        app.command(cls=Command)(command)


def status(
    job: Annotated[
        str | None,
        typer.Argument(help="A job id. Default: the latest jobs.", autocompletion=complete.jobs),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Number of jobs to list.")] = 20,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show changes until the job ends, or Ctrl-C.")
    ] = False,
    server: Server = None,
    data: Data = DATA,
    as_json: AsJson = False,
) -> None:
    """Show the latest jobs, or one job with its images."""
    from imagemill.client.errors import InvalidInput

    if watch and as_json:
        raise InvalidInput("--watch doesn't work with --json, which prints one document")
    if watch:
        _watch(job, limit, server, data)
        return
    console = Console()
    document = _fetch(job, limit, server, data)
    if as_json:
        print_json(document if job else document["data"])
    else:
        console.print(_shown(document))


def _fetch(job: str | None, limit: int, server: str | None, data: Path) -> dict[str, Any]:
    from imagemill.client import protocol

    if job is None:
        return _get(server, data, "/v1/jobs", limit=limit)
    return _get(server, data, protocol.job_path(job))


def _watch(job: str | None, limit: int, server: str | None, data: Path) -> None:
    """Show the state again and again, until the job has ended or the user stops."""
    from rich.live import Live

    from imagemill.terminal.interrupts import Interrupts
    from jobs.job import State

    console = Console()
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    before: dict[str, Any] = {}
    with Interrupts() as interrupts, live or nullcontext():
        while not interrupts.asked():
            document = _fetch(job, limit, server, data)
            if live is not None:
                live.update(_shown(document), refresh=True)
            elif document != before:
                console.print(_shown(document))
            before = document
            if job is not None and State(document["state"]).finished:
                return
            interrupts.rest(WATCH_PAUSE)
    raise typer.Exit(130)


def _shown(document: Mapping[str, Any]) -> RenderableType:
    """A list of jobs, or one job and its images."""
    from imagemill.terminal import show

    if "data" in document:
        return show.jobs_table(document["data"]) if document["data"] else "no jobs yet"
    images = document["images"]
    rows = [{**image, "file": _detail(image)} for image in images[:ROWS_SHOWN]]
    parts: list[RenderableType] = [
        show.job_facts(document),
        "",
        show.results_table(rows, last="details"),
    ]
    if len(images) > ROWS_SHOWN:
        parts.append(f"… and {len(images) - ROWS_SHOWN} more")
    return Group(*parts)


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
