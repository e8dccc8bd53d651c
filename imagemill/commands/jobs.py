"""Commands that change jobs: cancel, retry, delete.

They start nothing: without a server there is nothing to change, and one sentence says so.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from imagemill.commands import complete
from imagemill.commands.options import DATA, AsJson, Data, Server

if TYPE_CHECKING:
    from imagemill.client.jobs import Job

Jobs = Annotated[
    list[str],
    typer.Argument(metavar="JOB...", help="As `status` shows them.", autocompletion=complete.jobs),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (cancel, retry, delete):
        app.command()(command)


def cancel(jobs: Jobs, server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """Stop what has not finished of these jobs; finished images stay."""

    def one(job: "Job") -> tuple[dict[str, Any], str]:
        counts = job.cancel().counts
        made = f"{counts.succeeded} of {counts.total} images were made"
        return _standing(job), f"{job.state}; {made}, {counts.cancelled} cancelled"

    _each(jobs, one, server, data, as_json)


def retry(jobs: Jobs, server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """Make again what failed or was cancelled of these jobs, and only that."""

    def one(job: "Job") -> tuple[dict[str, Any], str]:
        counts = job.retry().counts
        return _standing(job), f"{job.state}; {counts.queued} of {counts.total} images are queued"

    _each(jobs, one, server, data, as_json)


def delete(jobs: Jobs, server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """Remove these jobs and their images from the server; what runs of them stops."""

    def one(job: "Job") -> tuple[dict[str, Any], str]:
        job.delete()
        return {"id": job.id, "deleted": True}, "deleted"

    _each(jobs, one, server, data, as_json)


def _standing(job: "Job") -> dict[str, Any]:
    return {"id": job.id, "state": job.state, "counts": job.raw["counts"]}


def _each(
    jobs: list[str],
    change: "Callable[[Job], tuple[dict[str, Any], str]]",
    server: str | None,
    data: Path,
    as_json: bool,
) -> None:
    """Change one job after the other; the first refusal ends it."""
    from imagemill.client.clients import Client
    from imagemill.local.find_server import given_server

    console, documents = Console(highlight=False, soft_wrap=True), []
    with Client(given_server(server, data)) as client:
        for name in jobs:
            job = client.job(name)
            document, said = change(job)
            documents.append(document)
            if not as_json:
                console.print(f"{job.id}: {said}")
    if as_json:
        typer.echo(json.dumps(documents, ensure_ascii=False, indent=2))
